"""Driver of a supervised job: check, plan, place, fit, tear down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.config.supervised import (
    FrozenRefConfig,
    KdRunConfig,
    KtoRunConfig,
    RmRunConfig,
    SupervisedConfig,
)
from rayrlhf.data.batch_plan import each_once
from rayrlhf.data.checks import check_example_sources
from rayrlhf.data.packed_order import PackedOrder
from rayrlhf.data.prepare import prepare_examples
from rayrlhf.data.sources.files import Split
from rayrlhf.data.step_order import StepOrder, can_fill, step_order
from rayrlhf.data.store import ExampleStore
from rayrlhf.data.stream import example_dataset, step_ranges
from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import drain_in_background, make_sinks
from rayrlhf.placement.plan import plan_supervised
from rayrlhf.placement.process_variables import threads_of
from rayrlhf.runtime.local_ray import LocalRay
from rayrlhf.runtime.model_checks import check_models, warn_invalid_generation_config
from rayrlhf.runtime.node_monitor import nodes_watched
from rayrlhf.runtime.preflight import check_model
from rayrlhf.runtime.ray_session import deploy, watched
from rayrlhf.runtime.resume import check_resume, check_unchanged, select_checkpoint
from rayrlhf.runtime.run import (
    TRAIN_FOLDER,
    DriverRun,
    check_placement,
    fit,
    fitted,
    make_trainer,
    placed,
    start_folder,
)
from rayrlhf.runtime.run_summary import write_supervised_summary
from rayrlhf.runtime.scratch import locked_scratch
from rayrlhf.storage.folder import DATA_FOLDER, Folder, run_folder
from rayrlhf.storage.run_file import fetched, run_file
from rayrlhf.supervised.job import SupervisedJob
from rayrlhf.supervised.loop import supervised_worker
from rayrlhf.supervised.reference_table import RefTable, is_whole, table_path
from rayrlhf.train.checkpoint import newest_step
from rayrlhf.train.frozen_server import teacher_deployment

SAMPLE_ROWS = 1024  # of the training data, from which a reward model's score normalisation is computed
START_SECONDS = 600.0  # for a served teacher to start


def run_supervised(config: SupervisedConfig, started: LocalRay | None = None) -> int:
    """Run a supervised job; returns the exit code of `DriverRun`."""
    with DriverRun(config, started) as run:
        config = run.pinned(config)
        for key, path in _model_paths(config):
            check_model(key, path)
        check_resume(config)
        check_example_sources(config.data)
        config = run.check_models(config)
        with run.ray(config):
            run.finished(_train(with_absolute_paths(config), run.console))
    return run.exit_code


@dataclass(frozen=True)
class Stores:
    train: ExampleStore
    held_out: ExampleStore | None

    def by_split(self) -> Iterator[tuple[str, ExampleStore]]:
        yield "train", self.train
        if self.held_out is not None:
            yield "eval", self.held_out


def _train(config: SupervisedConfig, console: Console) -> Path:
    """Plan, place and fit; returns the run's folder."""
    config = fitted(config, plan_supervised, console)
    run_path = start_folder(config)
    newest = select_checkpoint(config, console.say)
    spec = plan_supervised(config)
    check_placement(spec, config, console)
    check_models(config)
    warn_invalid_generation_config(config.model, console.say)
    stores = _prepare_stores(config, run_path, console.say)
    fixed = check_unchanged(config, newest, {"data.train": stores.train.fingerprint}, console.say)
    order = _order(config, stores.train, console.say)
    config = config.model_copy(update={"train": config.train.with_steps(len(stores.train), len(order))})
    start_folder(config)  # now with the number of steps
    with (
        placed(spec, config, console) as (run_id, slots, board),
        make_sinks(config, run_path, console) as sinks,
        locked_scratch(run_path, run_id),
        ExitStack() as stack,
    ):
        held_out = _held_out_rows(config, stores)
        needed = {"train": order.distinct, "eval": lambda: held_out}
        job = SupervisedJob(
            config=config,
            run_id=run_id,
            threads_per_worker=config.train.num_threads or threads_of(slots, "actor"),
            num_rows=len(stores.train),
            order=order,
            has_eval=stores.held_out is not None,
            num_sampled=_num_sampled(config, stores),
            fixed=fixed,
            ref_tables=_ref_tables(config, run_path, stores, needed, console.say),
        )
        trainer = make_trainer(
            partial(supervised_worker, job),
            config,
            slots,
            board=job.board,
            threads=job.threads_per_worker,
            datasets=_streams(job, stores, needed, run_folder(config.run, TRAIN_FOLDER)),
        )
        console.say(f"starting {config.train.num_workers} x trainer")
        if isinstance(config, KdRunConfig) and config.teacher.location == "serve":
            teacher = teacher_deployment(
                config.model,
                config.teacher.path,
                chunk_tokens=config.train.logprob_chunk_tokens,
                num_replicas=config.teacher.num_replicas,
                slots=slots,
            )
            deploy({job.teacher_app: teacher})
            stack.enter_context(
                watched(
                    [job.teacher_app],
                    timeout_seconds=START_SECONDS,
                    say=console.say,
                    failed=lambda what, then: sinks.write(Report("failure", 0, what, then=then)),
                    give_up=trainer.abort,
                )
            )
        stack.enter_context(drain_in_background(board, sinks))
        stack.enter_context(
            nodes_watched(
                slots,
                console,
                run_path,
                timeout_seconds=config.placement.start_timeout_seconds,
                give_up=trainer.abort,
            )
        )
        result = fit(trainer)
    write_supervised_summary(result, config, run_path)
    return run_path


def _prepare_stores(config: SupervisedConfig, run_path: Path, say: Callable[[str], None]) -> Stores:
    """Read, render and tokenize all samples. Raises `DataError`."""

    def prepare(split: Split) -> ExampleStore:
        store = prepare_examples(
            config.data.sources_of(split),
            config.data,
            config.model.path,
            run_path / DATA_FOLDER / f"{split}.arrow",
            config.run.seed,
            split=split,
            trust_remote_code=config.model.trust_remote_code,
        )
        say(f"{split} samples: " + ", ".join(f"{n} {what}" for what, n in store.counts.items() if n))
        return store.stored(run_file(config.run, f"{DATA_FOLDER}/{split}.arrow"))

    return Stores(train=prepare("train"), held_out=prepare("eval") if config.data.has_eval else None)


def _order(config: SupervisedConfig, store: ExampleStore, say: Callable[[str], None]) -> StepOrder:
    """The rows of every training step; warns of steps that cannot be as they are wanted."""
    train = config.train
    # KTO's second response is not trained on, and has micro-batches of its own.
    num_tokens = store.first_tokens if isinstance(config, KtoRunConfig) else store.num_tokens
    if train.fill_micro_batches and train.samples_per_step and not can_fill(train, num_tokens):
        say(
            f"warning: train.samples_per_step={train.samples_per_step} samples do not fill a whole number of "
            f"micro-batches on each of {train.num_workers} workers without favouring short or long ones: "
            "their order is kept; train.tokens_per_step fills them"
        )
    order = step_order(train, num_tokens, config.run.seed, config.data.shuffle)
    step_ranges(0, len(order), train.num_workers, order.most_rows)  # raises for too many
    if train.samples_per_step and len(store) < min(order.rows_before(len(order)), train.samples_per_step):
        say(
            f"warning: data.train has {len(store)} samples, fewer than train.samples_per_step="
            f"{train.samples_per_step}: samples repeat within a step"
        )
    if train.tokens_per_step and int(num_tokens.sum()) < train.tokens_per_step and len(order) > 1:
        say(
            f"warning: data.train has {int(num_tokens.sum())} tokens, fewer than train.tokens_per_step="
            f"{train.tokens_per_step}: a step has all samples once"
        )
    return _saved(order, config) if isinstance(order, PackedOrder) else order


def _saved(order: PackedOrder, config: SupervisedConfig) -> PackedOrder:
    folder = Path(config.run.path) / DATA_FOLDER
    return order.saved(folder, lambda name: run_file(config.run, f"{DATA_FOLDER}/{name}"))


def _held_out_rows(config: SupervisedConfig, stores: Stores) -> np.ndarray:
    """Row ids that evaluations use."""
    available = len(stores.held_out or ())
    return np.arange(min(config.eval.num_samples or available, available))


def _ref_tables(
    config: SupervisedConfig,
    run_path: Path,
    stores: Stores,
    needed: Mapping[str, Callable[[], np.ndarray]],
    say: Callable[[str], None],
) -> dict[str, RefTable]:
    """Files of the reference's precomputed log-probabilities, by split; empty without `ref.precompute`."""
    ref: FrozenRefConfig | None = getattr(config, "ref", None)  # of DPO and KTO
    if ref is None or not ref.precompute:
        return {}
    path = ref.path or config.model.path
    tables: dict[str, RefTable] = {}
    for split, store in stores.by_split():
        rows = needed[split]()
        table = table_path(run_path / DATA_FOLDER, split, store.fingerprint, rows, path)
        file = fetched(config.run, f"{DATA_FOLDER}/{table.name}")
        if file.is_file() and not is_whole(file):
            say(f"warning: {file.name} is damaged: the reference is computed again")
            file.unlink()
        tables[split] = RefTable(str(file), len(rows))
    return tables


def _num_sampled(config: SupervisedConfig, stores: Stores) -> int:
    """Number of training rows to score for normalisation: only for a reward model that is exported."""
    wanted = isinstance(config, RmRunConfig) and config.checkpoint.export
    return min(len(stores.train), SAMPLE_ROWS) if wanted else 0


def _streams(
    job: SupervisedJob, stores: Stores, needed: Mapping[str, Callable[[], np.ndarray]], storage: Folder
) -> dict[str, Any]:
    """Ray Data sets by name, for the trainer, as functions that create them. They are called whenever the
    workers (re)start, so that a resumed stream starts at its position.
    """
    config = job.config
    order = job.order

    def stream(store: ExampleStore, steps: Sequence[np.ndarray], start: int = 0) -> Any:
        return example_dataset(
            store.file,
            steps,
            start,
            world_size=config.train.num_workers,
            budget_tokens=config.train.max_tokens_per_micro_batch,
        )

    train_store = stores.train  # `Stores` would bring this module, and all that it imports, to the controller

    def train() -> Any:
        return stream(train_store, order, min(newest_step(storage), len(order) - 1))

    def once(store: ExampleStore, rows: np.ndarray) -> Callable[[], Any]:
        return lambda: stream(store, each_once(rows, job.rows_per_pass))

    streams: dict[str, Any] = {"train": train}
    if stores.held_out is not None:
        streams["eval"] = once(stores.held_out, needed["eval"]())
    if job.num_sampled:
        streams["sample"] = once(stores.train, np.arange(job.num_sampled))
    for split, store in stores.by_split():
        if split in job.ref_tables and not Path(job.ref_tables[split].file).is_file():
            streams[f"ref_{split}"] = once(store, needed[split]())
    return streams


def _model_paths(config: SupervisedConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    for section in ("ref", "teacher"):
        part = getattr(config, section, None)
        if part is not None and part.path is not None:
            yield f"{section}.path", part.path


def with_absolute_paths(config: SupervisedConfig) -> SupervisedConfig:
    """The config with absolute paths of the run's and the models' folders, because workers have other working
    directories.
    """
    changes: dict[str, Any] = {"run": config.run.absolute()}
    for key, path in _model_paths(config):
        section = key.partition(".")[0]
        if Path(path).is_dir():  # a hub id is kept
            part = getattr(config, section)
            changes[section] = part.model_copy(update={"path": str(Path(path).resolve())})
    return config.model_copy(update=changes)
