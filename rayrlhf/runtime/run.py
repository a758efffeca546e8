"""Driver of every job: exit codes, signals, placement, the trainer and teardown. No training data passes
here.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import ray
from ray._raylet import RAY_NODE_ID_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.data import ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from rayrlhf.capacity.budget import budget_lines
from rayrlhf.capacity.deadlines import with_deadlines
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.micro_batch import keys_sized_by_plan, sized_for_gpu, sized_for_host
from rayrlhf.config.base import ConfigError
from rayrlhf.config.common import DrivenConfig, JobConfig
from rayrlhf.config.parse import dump_resolved
from rayrlhf.data.rows.row import DataError
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.observe.board import Board
from rayrlhf.observe.console import Console
from rayrlhf.observe.wandb_access import check_wandb
from rayrlhf.placement.plan import PlacementSpec, shortfall, slots_in_words
from rayrlhf.placement.preload import is_enabled, prestart
from rayrlhf.placement.preset import with_preset
from rayrlhf.placement.process_variables import trainer_variables
from rayrlhf.placement.reaper import NAMESPACE, delete_apps, start_reaper, unregister_workers
from rayrlhf.placement.slots import (
    PlacementError,
    Slots,
    check_fits,
    create_slots,
    gpu_memory_bytes,
    resolve_gpus_per_slot,
)
from rayrlhf.placement.trainer import SlotTorchTrainer, slot_scaling
from rayrlhf.reward.items import RewardError
from rayrlhf.rollout.engine_arguments import check_engine_args
from rayrlhf.runtime.architecture_checks import check_architectures
from rayrlhf.runtime.file_checks import check_files
from rayrlhf.runtime.hub_models import fetch_here, fetch_on_nodes, pin, shared_access
from rayrlhf.runtime.interrupted import resume_message
from rayrlhf.runtime.local_ray import LocalRay
from rayrlhf.runtime.mirror import Mirror, mirror_of
from rayrlhf.runtime.prefix_checks import with_prefixes_shared
from rayrlhf.runtime.preflight import InputError, check_kernels, check_precision
from rayrlhf.runtime.process_environment import set_process_environment
from rayrlhf.runtime.ray_messages import RAY_LOG, ray_messages_in
from rayrlhf.runtime.ray_session import DeploymentFailed, ray_session
from rayrlhf.runtime.results import RunResult, Stopped
from rayrlhf.runtime.run_lock import run_lock
from rayrlhf.runtime.worker_failures import WorkerFailures
from rayrlhf.storage.file_systems import file_system
from rayrlhf.storage.folder import run_folder
from rayrlhf.train import process_group
from rayrlhf.train.checkpoint import TRAIN_FOLDER, newest_step
from rayrlhf.untrusted_text import guard_terminal, last_line, traceback_text

INPUT_ERRORS = (ConfigError, InputError, DataError, RewardError, PlacementError, HubError)

C = TypeVar("C", bound=DrivenConfig)

LIGHT_ACTORS = 7  # board, reaper, controller, and those of Ray Train and Ray Data
SERVE_ACTORS = 4  # weight store, Serve's controller, and a replica each of engines and rewards


class RunFailed(RuntimeError):
    """The run ended by a failure; the message is complete without a traceback."""


class StageFailed(RuntimeError):
    """A job within this one ended with an exit code and has printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class DriverRun:
    """Context of a job on its driver, from the first check to the exit code. Errors become one message.

        with DriverRun(config) as run:
            config = run.pinned(config)
            ...  # the job's own checks
            config = run.check_models(config)
            with run.ray(config):
                run.finished(train(config, run.console))
        return run.exit_code

    Exit codes: 0 done, 2 bad input, 1 anything else, 130 interrupted, 143 stopped by SIGTERM.
    """

    def __init__(self, config: DrivenConfig, started: LocalRay | None = None) -> None:
        """`started`: the Ray that `launch` has started for this job."""
        guard_terminal()
        set_process_environment()
        self.config = config
        self.started = started
        self.mirror: Mirror | None = None
        self.console = Console(config.observe.console)
        self.exit_code = 0
        self._previous = signal.getsignal(signal.SIGTERM)
        self._stop = _StopOnSignal()

    def pinned(self, config: C) -> C:
        """The config with hub ids pinned to commits. Raises one of `INPUT_ERRORS` for unusable files."""
        check_files(config)
        check_wandb(config)
        self.mirror = mirror_of(config.run)
        if self.mirror is not None:
            self.mirror.fetch(self.console.say)
        return pin(config, self.console.say)

    def check_models(self, config: C) -> C:
        """Check that the models' architectures are computed correctly, then fetch the models. Returns the
        config of a training job with the settings that these models support.
        """
        check_architectures(config, self.console.say)
        fetch_here(config, self.console.say)
        return with_prefixes_shared(config, self.console.say)

    @contextmanager
    def ray(self, config: DrivenConfig) -> Iterator[None]:
        """In this context Ray is connected and the run's folder is locked for this process."""
        run_path = Path(config.run.path)
        with (
            run_lock(run_path) as warning,
            nullcontext() if self.mirror is None else self.mirror.running(self.console.say),
            ray_messages_in(run_path / RAY_LOG),
            ray_session(NAMESPACE, self.started) as where,
            shared_access(config),
        ):
            signal.signal(signal.SIGTERM, self._stop)  # after ray.init, which installs its own handler
            if warning is not None:
                self.console.say(f"warning: {warning}")
            self.console.say(where)
            if self.started is not None and is_enabled():
                prestart({}, LIGHT_ACTORS + (SERVE_ACTORS if hasattr(config, "rollout") else 0))
            yield

    def finished(self, run_path: Path) -> None:
        self.console.summary(run_path, self.config.run.url)

    def __enter__(self) -> Self:
        if self.started is not None:  # ray.init has installed its own handler
            signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            code = None if error is None else self._explain(error)
            if self.mirror is not None and self.mirror.copied:  # what explains the error
                self.mirror.close(self.console.say)
        finally:
            signal.signal(signal.SIGTERM, self._previous)
        if code is None:
            return False
        self.exit_code = code
        return True

    def _explain(self, error: BaseException) -> int | None:
        """Print the error that ended the body; returns its exit code, or None for an unexpected error."""
        if isinstance(error, INPUT_ERRORS):
            self.console.error(str(error))
            return 2
        if isinstance(error, DeploymentFailed | RunFailed):
            log = Path(self.config.run.path) / "error.log"
            log.write_text(traceback_text(error), encoding="utf-8")
            self.console.error(f"{error}\n(details: {log})")
            return 1
        if isinstance(error, StageFailed):
            return error.code
        if isinstance(error, KeyboardInterrupt):
            how, code = ("stopped by SIGTERM", 143) if self._stop.received else ("interrupted", 130)
            self.console.error(f"{how}; {resume_message(self.config)}")
            return code
        return None


def start_folder(config: Any) -> Path:
    """Create the run's folder and write the resolved config into it."""
    run_path = Path(config.run.path)
    run_path.mkdir(parents=True, exist_ok=True)
    (run_path / "config.yaml").write_text(dump_resolved(config))
    return run_path


def fitted(config: C, plan: Callable[[C], PlacementSpec], console: Console) -> C:
    """Fill in the settings that depend on the cluster: which roles share slots, micro-batch sizes, and
    deadlines. Raises `ConfigError`.
    """
    gpus = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    total: Any = ray.cluster_resources()
    found = with_preset(
        config, plan, lambda spec: shortfall(spec, total=total, free=total, gpus_per_slot=gpus) is None
    )
    if found.placement.preset != config.placement.preset:
        console.say(
            f"placement.preset=auto: {found.placement.preset}, {slots_in_words(plan(found).num_slots)}"
        )
    left = keys_sized_by_plan(found, on_gpu=gpus > 0)
    memory = gpu_memory_bytes() if gpus else None
    if left and memory is not None:
        found = sized_for_gpu(found, Gpu("GPU", memory, 0.0, 0.0))
    elif left and not gpus and len(ray.nodes()) == 1:
        found = sized_for_host(found, psutil.virtual_memory().total)
    for key in left:
        section, _, name = key.partition(".")
        console.say(f"{key}={getattr(getattr(found, section), name)}, as it is not set")
    gpu = None if memory is None else Gpu("GPU", memory, 0.0, 0.0)
    found, lines = with_deadlines(found, on_gpu=gpus > 0, gpu=gpu)
    for line in lines:
        console.say(line)
    return found


def check_placement(spec: PlacementSpec, config: DrivenConfig, console: Console) -> None:
    """Print the memory budget of every role.

    Raises:
        PlacementError: if the cluster is too small.
        ConfigError: for a precision that these devices do not support, or a compiler that they do not have.
    """
    gpus = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    check_precision(config, on_gpu=gpus > 0)
    check_engine_args(config, on_gpu=gpus > 0)
    check_kernels(config, on_gpu=gpus > 0)
    for line in budget_lines(config, on_gpu=gpus > 0):
        console.say(line)
    check_fits(spec, gpus)


@contextmanager
def placed(spec: PlacementSpec, config: DrivenConfig, console: Console) -> Iterator[tuple[str, Slots, Any]]:
    """Create the run's slots and board; yields run id, slots and board. On exit the run's apps, actors and
    placement group are always removed; after a kill -9 of the driver the reaper does that.
    """
    run_id = f"rayrlhf-{config.run.name}-{uuid.uuid4().hex[:6]}"
    slots = create_slots(
        spec,
        gpus_per_slot=resolve_gpus_per_slot(config.placement.gpus_per_slot),
        run_id=run_id,
        timeout_seconds=config.placement.start_timeout_seconds,
    )
    console.placement(slots)
    try:
        fetch_on_nodes(config, slots, console.say)
    except BaseException:
        slots.remove()
        raise
    board = named_actor(Board, f"{run_id}-board")
    reaper = start_reaper(run_id, f"{run_id}-board", slots.group)
    try:
        yield run_id, slots, board
    finally:
        delete_apps(run_id)
        slots.remove()
        unregister_workers(run_id)
        for actor in (reaper, board):  # a process that keeps its Ray would keep them too
            ray.kill(actor)


def named_actor(actor_class: type, name: str, **arguments: Any) -> Any:
    """Create a lightweight actor that other processes look up by name.

    It is placed on the driver's node: it ends with the driver anyway, and so no other node's death can end
    it. When only its process dies, Ray restarts it, and its clients restore its state.
    """
    here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "namespace": NAMESPACE, "label_selector": here}
    options["max_restarts"] = -1
    return ray.remote(actor_class).options(**options).remote(**arguments)


def make_trainer(
    worker: partial[RunResult | Stopped | None],
    config: JobConfig,
    slots: Slots,
    *,
    board: str,
    threads: int,
    datasets: dict[str, Any],
    role: str = "actor",
    folder: str = TRAIN_FOLDER,
) -> SlotTorchTrainer:
    """A trainer whose workers run `worker()` on the slots of `role`. `folder`: Ray Train's, in the run's."""
    return SlotTorchTrainer(
        worker,
        scaling_config=slot_scaling(slots, role),
        torch_config=TorchConfig(
            backend=process_group.ON_GPUS if slots.have_gpus else process_group.ON_CPUS,
            timeout_s=config.train.collective_timeout_seconds,
        ),
        run_config=RunConfig(
            name=folder,
            **_storage(config),
            failure_config=FailureConfig(max_failures=config.train.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            worker_runtime_env={
                "env_vars": trainer_variables(threads, worker.func.__module__, on_gpu=slots.have_gpus)
            },
            callbacks=[
                WorkerFailures(
                    board,
                    role=role,
                    max_failures=config.train.max_failures,
                    saved_step=newest_step(run_folder(config.run, folder)),
                )
            ],
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )


def _storage(config: JobConfig) -> dict[str, Any]:
    """Ray Train's arguments for the run's folder."""
    if config.run.url is None:
        return {"storage_path": config.run.path}
    files, path = file_system(config.run.url)  # opened here: Ray knows only the schemes of Arrow
    return {"storage_path": path, "storage_filesystem": files}


def fit(trainer: SlotTorchTrainer) -> Any:
    """Train, and return rank 0's result: a `RunResult`, except for a critic. Raises `RunFailed`."""
    try:
        result: Any = trainer.fit().return_value  # rank 0's
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        raise RunFailed(f"training failed: {last_line(str(next(iter(failures.values()))))}") from error
    if isinstance(result, Stopped):
        raise RunFailed(result.reason)
    return result


class _StopOnSignal:
    """SIGTERM handler (`ray job stop` sends it) that raises, so that every `finally` runs.

    It raises KeyboardInterrupt, the only exception of a signal handler that Ray's blocking calls propagate.
    """

    def __init__(self) -> None:
        self.received = False

    def __call__(self, _signal: int, _frame: Any) -> None:
        self.received = True
        raise KeyboardInterrupt
