"""What the driver of every training job does around its own part: errors to exit codes, signals, the trainer,
tearing down. No training data passes through here.
"""

from __future__ import annotations

import os
from pathlib import Path

# Ray Train reads these when it is imported. Reports are polled; at the default interval each costs two
# seconds.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A run has more processes than a small machine has cores, and Ray would warn of it at every start.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
# transformers imports DeepSpeed, which otherwise tells everybody that it has found no accelerator.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import ray
from ray._raylet import RAY_NODE_ID_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.data import ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from rayrlhf.capacity.budget import told_budget
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.micro_batch import left_to_the_device, sized_for_gpu, sized_for_host
from rayrlhf.config.base import ConfigError
from rayrlhf.config.common import DrivenConfig, JobConfig
from rayrlhf.config.load import dump_resolved
from rayrlhf.data.rows.row import DataError
from rayrlhf.hub.access import offline_variable
from rayrlhf.hub.errors import HubError
from rayrlhf.observe.board import Board
from rayrlhf.observe.console import Console
from rayrlhf.observe.wandb_access import check_wandb
from rayrlhf.placement.plan import PlacementSpec, shortfall, slots_in_words
from rayrlhf.placement.preset import with_preset
from rayrlhf.placement.reaper import NAMESPACE, delete_apps, forget_seats, start_reaper
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
from rayrlhf.runtime.architecture_checks import check_architectures
from rayrlhf.runtime.file_checks import check_files
from rayrlhf.runtime.hub_models import fetch_here, fetch_on_nodes, lent_access, pin
from rayrlhf.runtime.interrupted import what_goes_on
from rayrlhf.runtime.preflight import InputError, check_precision
from rayrlhf.runtime.ray_messages import RAY_LOG, ray_messages_in
from rayrlhf.runtime.ray_session import DeploymentFailed, last_line, ray_session
from rayrlhf.runtime.results import RunResult, Stopped
from rayrlhf.runtime.run_lock import run_lock
from rayrlhf.runtime.worker_failures import WorkerFailures
from rayrlhf.train.checkpoint import TRAIN_FOLDER, newest_step
from rayrlhf.untrusted_text import guard_terminal, traceback_text

INPUT_ERRORS = (ConfigError, InputError, DataError, RewardError, PlacementError, HubError)

C = TypeVar("C", bound=DrivenConfig)


class RunFailed(RuntimeError):
    """The run stopped by itself; the message is the whole story."""


class PartFailed(RuntimeError):
    """A job within this one ended with an exit code, and has told why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def drive(config: C, check: Callable[[C], Callable[[Console], Path]]) -> int:
    """Run a job to its end. `check` looks at what can be known without Ray and returns the rest of the job,
    which returns the run's folder.

    Returns the exit code: 0 done, 2 bad input, 1 anything else; errors are one clear message.
    """
    guard_terminal()
    console = Console(config.observe.console)
    previous = signal.getsignal(signal.SIGTERM)
    stopped = _StopOnSignal()
    try:
        check_files(config)
        check_wandb(config)
        config = pin(config, console.say)
        body = check(config)
        check_architectures(config, console.say)
        fetch_here(config, console.say)
        with (
            run_lock(Path(config.run.path)) as warning,
            ray_messages_in(Path(config.run.path) / RAY_LOG),
            ray_session(NAMESPACE) as where,
            lent_access(config),
        ):
            signal.signal(signal.SIGTERM, stopped)  # after ray.init, which installs its own
            if warning is not None:
                console.say(f"warning: {warning}")
            console.say(where)
            run_path = body(console)
        console.summary(run_path)
        return 0
    except INPUT_ERRORS as error:
        console.error(str(error))
        return 2
    except (DeploymentFailed, RunFailed) as error:
        log = Path(config.run.path) / "error.log"
        log.write_text(traceback_text(error), encoding="utf-8")
        console.error(f"{error}\n(details: {log})")
        return 1
    except PartFailed as part:
        return part.code
    except KeyboardInterrupt:
        how, code = ("stopped by SIGTERM", 143) if stopped.received else ("interrupted", 130)
        console.error(f"{how}; {what_goes_on(config)}")
        return code
    finally:
        signal.signal(signal.SIGTERM, previous)


def start_folder(config: Any) -> Path:
    """The run's folder, with the resolved config in it."""
    run_path = Path(config.run.path)
    run_path.mkdir(parents=True, exist_ok=True)
    (run_path / "config.yaml").write_text(dump_resolved(config))
    return run_path


def fitted(config: C, plan: Callable[[C], PlacementSpec], console: Console) -> C:
    """The config with what it leaves to the cluster: which roles share slots, how large micro-batches are."""
    gpus = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    total: Any = ray.cluster_resources()
    found = with_preset(
        config, plan, lambda spec: shortfall(spec, total=total, free=total, gpus_per_slot=gpus) is None
    )
    if found.placement.preset != config.placement.preset:
        console.say(
            f"placement.preset=auto: {found.placement.preset}, {slots_in_words(plan(found).num_slots)}"
        )
    left = left_to_the_device(found, on_gpu=gpus > 0)
    memory = gpu_memory_bytes() if left and gpus else None
    if memory is not None:
        found = sized_for_gpu(found, Gpu("GPU", memory, 0.0, 0.0))
    elif left and not gpus and len(ray.nodes()) == 1:
        found = sized_for_host(found, psutil.virtual_memory().total)
    for key in left:
        section, _, name = key.partition(".")
        console.say(f"{key}={getattr(getattr(found, section), name)}, as it is not set")
    return found


def check_placement(spec: PlacementSpec, config: DrivenConfig, console: Console) -> None:
    """Tell what every role will hold. Raises `PlacementError` when the cluster is too small, `ConfigError`
    for a precision that these devices do not have.
    """
    gpus = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    check_precision(config, on_gpu=gpus > 0)
    for line in told_budget(config, on_gpu=gpus > 0):
        console.say(line)
    check_fits(spec, gpus)


@contextmanager
def placed(spec: PlacementSpec, config: DrivenConfig, console: Console) -> Iterator[tuple[str, Slots, Any]]:
    """The run's id, its slots and its board. Whatever happens, this run's apps, actors and group go again; a
    kill -9 of the driver leaves that to the reaper.
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
        forget_seats(run_id)
        for actor in (reaper, board):  # in a process that keeps its Ray, they would stay as long as it
            ray.kill(actor)


def named_actor(actor_class: type, name: str, **arguments: Any) -> Any:
    """A light actor that others look up by its name. It lives on the driver's node: it dies with the driver
    anyway, and no other node can take it along. When its process alone dies, Ray starts it again, and who
    uses it sees to it that it has its state again.
    """
    here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "namespace": NAMESPACE, "label_selector": here}
    options["max_restarts"] = -1
    return ray.remote(actor_class).options(**options).remote(**arguments)


def make_trainer(
    worker: Callable[[], RunResult | Stopped | None],
    config: JobConfig,
    slots: Slots,
    *,
    board: str,
    threads: int,
    datasets: dict[str, Any],
    role: str = "actor",
    folder: str = TRAIN_FOLDER,
) -> SlotTorchTrainer:
    """A trainer whose workers run `worker()` on the slots of `role`. `folder`: Ray Train's in the run's."""
    return SlotTorchTrainer(
        worker,
        scaling_config=slot_scaling(slots, role),
        torch_config=TorchConfig(
            backend="nccl" if slots.have_gpus else "gloo", timeout_s=config.train.collective_timeout_seconds
        ),
        run_config=RunConfig(
            name=folder,
            storage_path=str(config.run.path),
            failure_config=FailureConfig(max_failures=config.train.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            worker_runtime_env={"env_vars": _worker_environment(threads)},
            callbacks=[
                WorkerFailures(
                    board,
                    role=role,
                    max_failures=config.train.max_failures,
                    saved_step=newest_step(Path(config.run.path) / folder),
                )
            ],
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )


def fit(trainer: SlotTorchTrainer) -> Any:
    """Train, and return what rank 0's loop returned: a `RunResult`, but for a critic. Raises `RunFailed`."""
    try:
        result: Any = trainer.fit().return_value  # rank 0's
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        raise RunFailed(f"training failed: {last_line(str(next(iter(failures.values()))))}") from error
    if isinstance(result, Stopped):
        raise RunFailed(result.reason)
    return result


def threads_each(processes: int) -> int:
    """Threads of each of so many processes on a node, if they may use all its cores."""
    return max(1, (os.cpu_count() or 1) // processes)


def _worker_environment(threads: int) -> dict[str, str]:
    return {
        **offline_variable(),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "1",  # threads of the role that waits must not spin on cores that the other needs
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


class _StopOnSignal:
    """`ray job stop` sends SIGTERM: leave through every `finally`.

    By KeyboardInterrupt, since Ray's blocking calls let no other exception of a signal handler through.
    """

    def __init__(self) -> None:
        self.received = False

    def __call__(self, _signal: int, _frame: Any) -> None:
        self.received = True
        raise KeyboardInterrupt
