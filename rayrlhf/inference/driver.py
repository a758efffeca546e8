"""Driver of batch inference: validate, prepare the rows, serve engines and rewards, process the rows shard by
shard, merge the output. No trainer; rows pass through this process only when the shard files are merged.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.data.checks import check_sources
from rayrlhf.data.prepare import prepare_prompts
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.source import ordered_and_quiet
from rayrlhf.data.store import PromptStore
from rayrlhf.inference.shards import (
    NEW_COLUMNS,
    Shard,
    ShardFolder,
    Tally,
    answers_of,
    merge,
    plan_shards,
    read_rows,
    tally_file,
)
from rayrlhf.inference.worker import GenerateJob, Pace, ShardWorker
from rayrlhf.observe.console import Console
from rayrlhf.observe.rows import RowsProgress
from rayrlhf.observe.sinks import Sinks, drain_in_background
from rayrlhf.placement.plan import plan_generate
from rayrlhf.placement.process_variables import threads_of
from rayrlhf.placement.slots import Slots
from rayrlhf.reward.deployments import reward_app_names, reward_apps
from rayrlhf.reward.reading import PromptFormat
from rayrlhf.rollout.engine import rollout_deployment
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.runtime.fingerprint import check_identity, without_operational_keys
from rayrlhf.runtime.preflight import (
    InputError,
    absolute,
    absolute_rewards,
    check_model,
    check_stops,
    find_rewards,
    reward_model_paths,
    try_rewards,
)
from rayrlhf.runtime.ray_session import deploy, wait_for_apps
from rayrlhf.runtime.reporting import ToBoard
from rayrlhf.runtime.run import (
    DriverRun,
    RunFailed,
    check_placement,
    placed,
    start_folder,
)
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.folder import DATA_FOLDER, run_folder
from rayrlhf.storage.run_file import run_file
from rayrlhf.untrusted_text import last_line
from rayrlhf.usercode import UserCode

GENERATIONS = "generations.jsonl"
SUMMARY = "summary.json"
IDENTITY = "generate.json"
NUM_SHOWN = 5  # responses in the summary


def run_generate(config: GenerateRunConfig) -> int:
    """Run a batch inference job; returns the exit code of `DriverRun`."""
    with DriverRun(config) as run:
        config = run.pinned(config)
        functions = _check(config)
        run.check_models(config)
        with run.ray(config):
            run.finished(_run(with_absolute_paths(config), functions, run.console))
    return run.exit_code


def _check(config: GenerateRunConfig) -> dict[int, UserCode]:
    """The user's reward functions. Raises one of `INPUT_ERRORS`."""
    check_model("model.path", config.model.path)
    for key, path in reward_model_paths(config.reward) if config.reward else ():
        check_model(key, path)
    check_sources(config.data)
    functions = find_rewards(config.reward) if config.reward else {}
    config = with_absolute_paths(config)
    output, run_path = output_path(config), Path(config.run.path)
    if output.exists() and not (run_path / IDENTITY).exists():
        raise InputError(
            f"generate.output={output} exists and was not written by this run ({run_path}); "
            "choose another path, or move the file"
        )
    return functions


def with_absolute_paths(config: GenerateRunConfig) -> GenerateRunConfig:
    """Resolve relative paths: workers run in other working directories."""
    changes: dict[str, Any] = {
        "run": config.run.absolute(),
        "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
    }
    if config.generate.output is not None:
        output = str(Path(config.generate.output).resolve())
        changes["generate"] = config.generate.model_copy(update={"output": output})
    if config.reward is not None:
        changes["reward"] = absolute_rewards(config.reward)
    return config.model_copy(update=changes)


def _prompt_format(config: GenerateRunConfig) -> PromptFormat:
    return PromptFormat(config.model.path, config.data, config.model.trust_remote_code)


def output_path(config: GenerateRunConfig) -> Path:
    return Path(config.generate.output or Path(config.run.path) / GENERATIONS)


def _run(config: GenerateRunConfig, functions: dict[int, UserCode], console: Console) -> Path:
    started = time.monotonic()
    run_path, output = Path(config.run.path), output_path(config)
    store = _prepare_rows(config, run_path, console)
    check_identity(run_path / IDENTITY, _identity(config, store), resume=config.run.resume)
    start_folder(config)
    if output.is_file() and (run_path / SUMMARY).is_file():
        console.say(f"all rows are done already, in {output}")
        return run_path
    check_columns(store, config)
    check_stops(config.model, config.data, {"rollout.sampling.stop": config.rollout.sampling.stop})
    if config.reward is not None:
        try_rewards(
            functions,
            config.reward,
            config.data.label_key,
            store,
            run_path,
            console.say,
            prompt_format=_prompt_format(config),
        )
    shards = plan_shards(config.generate.num_rows or len(store), config.generate.rows_per_shard)
    folder = ShardFolder(run_folder(config.run, "shards"))
    pace = Pace(time.monotonic())
    if pending := folder.pending(shards):
        _answer_all(config, functions, store, folder, shards, pending, pace, console)
    merge(folder, shards, output)
    tally = tally_file(output, scored=config.reward is not None)
    summary = _summary(config, output, tally, pace, store.counts, seconds=time.monotonic() - started)
    write_atomically(run_path / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    folder.remove()
    return run_path


def _prepare_rows(config: GenerateRunConfig, run_path: Path, console: Console) -> PromptStore:
    store = prepare_prompts(
        config.data.train,
        config.data,
        config.model.path,
        run_path / DATA_FOLDER / "rows.arrow",
        config.run.seed,
        trust_remote_code=config.model.trust_remote_code,
    )
    console.say("rows: " + ", ".join(f"{n} {what}" for what, n in store.counts.items() if n))
    return store.stored(run_file(config.run, f"{DATA_FOLDER}/rows.arrow"))


def _identity(config: GenerateRunConfig, store: PromptStore) -> dict[str, Any]:
    """All values that the output depends on."""
    reward = config.reward.model_dump(mode="json") if config.reward else None
    return {
        "run": {"seed": config.run.seed},
        "model": config.model.model_dump(mode="json", include={"path", "dtype"}),
        "data": {
            "fingerprint of the rows and prompts": store.fingerprint,
            "response_key": config.data.response_key,
        },
        "rollout": config.rollout.model_dump(mode="json", include={"group_size", "sampling", "dtype"}),
        "generate": config.generate.model_dump(
            mode="json", include={"first_row", "num_rows", "rows_per_shard", "output"}
        ),
        "reward": without_operational_keys(reward),
    }


def check_columns(store: PromptStore, config: GenerateRunConfig) -> None:
    """Raise `DataError` if a column would be overwritten, or does not hold a response to score."""
    key = config.data.response_key
    taken = set() if config.generate.overwrite_columns else set(NEW_COLUMNS) - {key}
    for prompt in store:
        lost = sorted(taken & prompt.columns.keys())
        if lost:
            raise DataError(
                f"row {prompt.row_id} has a column {lost[0]!r}, which this job writes; rename it, or set "
                "generate.overwrite_columns=true to replace it"
            )
        if key is not None and not isinstance(prompt.columns.get(key), str):
            raise DataError(
                f"row {prompt.row_id}: column {key!r} (data.response_key) holds "
                f"{prompt.columns.get(key)!r:.80}; wanted a text"
            )


def _answer_all(
    config: GenerateRunConfig,
    functions: dict[int, UserCode],
    store: PromptStore,
    folder: ShardFolder,
    shards: Sequence[Shard],
    pending: Sequence[Shard],
    pace: Pace,
    console: Console,
) -> None:
    """Start the engines and reward apps, and process all pending shards. Raises `RunFailed`."""
    spec = plan_generate(config)
    if spec.roles[0].role == "score":
        no_gpu = config.placement.model_copy(update={"gpus_per_slot": 0})
        config = config.model_copy(update={"placement": no_gpu})
    check_placement(spec, config, console)
    with placed(spec, config, console) as (run_id, slots, board), ExitStack() as stack:
        job = GenerateJob(
            config=config,
            run_id=run_id,
            reward_apps=reward_app_names(config.reward, run_id) if config.reward else (),
            store=store.file,
            folder=folder,
            num_workers=num_workers(config, len(pending)),
        )
        apps = _apps(job, slots, functions)
        stack.enter_context(drain_in_background(board, Sinks([console])))
        console.say(f"starting {len(apps)} apps")
        deploy(apps)
        wait_for_apps(set(apps), timeout_seconds=config.rollout.start_timeout_seconds, say=console.say)
        total = sum(map(len, shards))
        done = total - sum(map(len, pending))
        if done:
            console.say(f"resuming after {done} of {total} rows")
        pace.started = time.monotonic()
        with RowsProgress(console, total=total, done=done) as progress:
            for result in _results(job, pending):
                if result["warning"]:
                    console.say(f"warning: {result['warning']}")
                if result["problem"]:
                    raise RunFailed(f"{result['problem']}\nThe same command resumes with these rows")
                pace.add(result)
                progress.advance(result["rows"])
                progress.update(pace.line(progress.num_left))


def num_workers(config: GenerateRunConfig, num_pending: int) -> int:
    """Enough concurrent shards to fill the engines, plus one; at most one per engine, plus one."""
    engines = config.rollout.num_engines
    samples_per_shard = config.generate.rows_per_shard * config.rollout.group_size
    wanted = math.ceil(engines * config.rollout.max_concurrent_requests / samples_per_shard) + 1
    return min(wanted, engines + 1, num_pending)


def _apps(job: GenerateJob, slots: Slots, functions: dict[int, UserCode]) -> dict[str, Any]:
    config = job.config
    rollout = config.rollout
    apps: dict[str, Any] = {}
    if config.data.response_key is None:
        settings = engine_settings(
            config.model,
            rollout,
            seed=config.run.seed,
            max_model_tokens=config.data.max_prompt_tokens + rollout.sampling.max_new_tokens,
            weight_store=None,
            on_gpu=slots.have_gpus,
            threads=threads_of(slots, "rollout"),
        )
        apps[job.rollout_app] = rollout_deployment(
            settings,
            slots,
            num_engines=rollout.num_engines,
            max_requests=rollout.max_concurrent_requests,
        )
    if config.reward is not None:
        apps |= reward_apps(
            config.reward,
            job.reward_apps,
            functions,
            prompt_format=_prompt_format(config),
            label_key=config.data.label_key,
            slots=slots,
            run_path=config.run.path,
            say=ToBoard(job.board),
        )
    return apps


def _results(job: GenerateJob, pending: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """The workers' report of each shard. Raises `RunFailed`."""
    blocks = [pa.table({key: [value] for key, value in vars(shard).items()}) for shard in pending]
    with ordered_and_quiet():
        results = ray.data.from_arrow(blocks).map_batches(
            ShardWorker,
            fn_constructor_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=job.num_workers,
        )
        try:
            batches: Iterator[Any] = iter(results.iter_batches(batch_size=None, batch_format="pyarrow"))
            for batch in batches:
                yield from batch.to_pylist()
        except RayError as error:
            raise RunFailed(f"batch inference failed: {last_line(str(error))}") from error


def _summary(
    config: GenerateRunConfig,
    output: Path,
    tally: Tally,
    pace: Pace,
    counts: dict[str, int],
    *,
    seconds: float,
) -> dict[str, Any]:
    mean, interval = tally.score()
    answering = max(1e-9, time.monotonic() - pace.started)
    return {
        "job": config.job,
        "output": str(output),
        **tally.counts(),
        "left_out": {name: n for name, n in counts.items() if n and name != "rows"},
        "score_mean": mean,
        "score_ci": interval,
        "seconds": round(seconds, 1),  # since this start
        "response_tokens_per_second": round(pace.response_tokens / answering, 1),
        "shown": _shown(config, output, tally.rows),
    }


def _shown(config: GenerateRunConfig, output: Path, num_rows: int) -> list[dict[str, Any]]:
    """A few evenly spaced rows with their first response."""
    step = max(1, num_rows // NUM_SHOWN)
    rows = [row for index, row in enumerate(read_rows(output)) if index % step == 0][:NUM_SHOWN]
    shown = []
    for row in rows:
        answer = next(iter(answers_of(row)), None)
        shown.append(
            {
                "prompt": row.get(config.data.prompt_key),
                "response": answer and answer.response,
                "score": answer and answer.score,
            }
        )
    return shown
