"""The driver of a policy run: check, plan, place, serve, fit, tear down. No training data passes through
here.
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
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from rayrlhf.config.load import dump_resolved
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.data.rows import DataError
from rayrlhf.loops.apps import run_apps
from rayrlhf.loops.checks import (
    InputError,
    Prepared,
    check_before_ray,
    try_out_environment,
    try_rewards,
    with_absolute_paths,
)
from rayrlhf.loops.job import PolicyJob
from rayrlhf.loops.policy import policy_loop
from rayrlhf.loops.policy_async import async_policy_loop
from rayrlhf.loops.session import DeploymentFailed, deploy, last_line, ray_session, watched
from rayrlhf.loops.streams import Stores, prepare_stores, training_streams
from rayrlhf.loops.summary import write_summary
from rayrlhf.observe.board import Board
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import drain_in_background, make_sinks
from rayrlhf.placement.apply import PlacementError, Slots, check_fits, create_slots, resolve_gpus_per_slot
from rayrlhf.placement.lease import NAMESPACE, delete_apps, start_reaper
from rayrlhf.placement.plan import plan_placement
from rayrlhf.placement.trainer import SlotTorchTrainer, slot_scaling
from rayrlhf.reward.items import RewardError
from rayrlhf.rollout.weight_sync import WeightHub

INPUT_ERRORS = (InputError, DataError, RewardError, PlacementError)
TRAIN_FOLDER = "checkpoints"


class RunFailed(RuntimeError):
    """The run stopped by itself; the message is the whole story."""


def run_policy(config: PolicyRunConfig) -> int:
    """Run to the end. Returns the exit code: 0 done, 2 bad input, 1 anything else; errors are one clear
    message.
    """
    console = Console(config.observe.console)
    previous = signal.getsignal(signal.SIGTERM)
    stopped = _StopOnSignal()
    try:
        prepared = check_before_ray(config)
        config = with_absolute_paths(config)
        with ray_session(NAMESPACE) as where:
            signal.signal(signal.SIGTERM, stopped)  # after ray.init, which installs its own
            console.say(where)
            _run(config, prepared, console)
        console.summary(Path(config.run.path))
        return 0
    except INPUT_ERRORS as error:
        console.error(str(error))
        return 2
    except (DeploymentFailed, RunFailed) as error:
        (Path(config.run.path) / "error.log").write_text(traceback.format_exc())
        console.error(f"{error}\n(details: {Path(config.run.path) / 'error.log'})")
        return 1
    except KeyboardInterrupt:
        how, code = ("stopped by SIGTERM", 143) if stopped.received else ("interrupted", 130)
        console.error(f"{how}; the same command goes on from the newest checkpoint")
        return code
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(config: PolicyRunConfig, prepared: Prepared, console: Console) -> None:
    run_path = Path(config.run.path)
    run_path.mkdir(parents=True, exist_ok=True)
    (run_path / "config.yaml").write_text(dump_resolved(config))
    spec = plan_placement(config)
    gpus_per_slot = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    check_fits(spec, gpus_per_slot)
    stores = prepare_stores(config, run_path, console.say)
    try_rewards(prepared.reward_functions, config, stores.train)
    try_out_environment(prepared.environment, config, stores.train)
    run_id = f"rayrlhf-{config.run.name}-{uuid.uuid4().hex[:6]}"
    slots = create_slots(
        spec, gpus_per_slot=gpus_per_slot, name=run_id, timeout_seconds=config.placement.start_timeout_seconds
    )
    console.placement(slots)
    actors = {"num_cpus": 0, "namespace": NAMESPACE}
    board = ray.remote(Board).options(name=f"{run_id}-board", **actors).remote()
    hub = ray.remote(WeightHub).options(name=f"{run_id}-weights", **actors).remote()
    with _torn_down(run_id, board, hub, slots), make_sinks(config, run_path, console) as sinks:
        job = PolicyJob(
            config=config,
            run_id=run_id,
            reward_apps=tuple(
                (name, source.weight, "" if source.type == "environment" else f"{run_id}-reward{i}")
                for i, (name, source) in enumerate(
                    zip(config.reward.source_names, config.reward.sources, strict=True)
                )
            ),
            num_eval_prompts=stores.num_eval_prompts(config),
            threads_per_worker=config.train.num_threads or _threads(config.train.num_workers),
        )
        trainer = _make_trainer(job, slots, run_path, stores)
        apps = run_apps(job, slots, prepared, threads=_threads(config.rollout.num_engines))
        console.say(
            f"starting {config.train.num_workers} x trainer, {config.rollout.num_engines} x vLLM engine, "
            f"{len(apps) - 1} x reward, reference or environment"
        )
        deploy(apps)
        # Engines and trainer come up side by side; the workers' first request waits for the engines.
        up = watched(
            apps,
            timeout_seconds=config.rollout.start_timeout_seconds,
            tell=console.say,
            give_up=trainer.abort,
        )
        with drain_in_background(board, sinks), up:
            result = _fit(trainer)
    write_summary(result, run_path, num_samples=config.eval.show_samples)


def _make_trainer(job: PolicyJob, slots: Slots, run_path: Path, stores: Stores) -> SlotTorchTrainer:
    config = job.config
    return SlotTorchTrainer(
        policy_loop if config.rollout.max_staleness is None else async_policy_loop,
        train_loop_config={"job": job},
        scaling_config=slot_scaling(slots, "trainer"),
        torch_config=TorchConfig(timeout_s=config.train.collective_timeout_seconds),
        run_config=RunConfig(
            name=TRAIN_FOLDER,
            storage_path=str(run_path),
            failure_config=FailureConfig(max_failures=config.train.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            worker_runtime_env={"env_vars": _worker_environment(job)},
        ),
        datasets=training_streams(job, stores, storage=run_path / TRAIN_FOLDER),
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )


def _fit(trainer: SlotTorchTrainer) -> dict[str, Any]:
    """Train, and return what rank 0's loop returned. Raises `RunFailed`."""
    try:
        result: Any = trainer.fit().return_value  # rank 0's
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        raise RunFailed(f"training failed: {last_line(str(next(iter(failures.values()))))}") from error
    if "failure" in result:
        raise RunFailed(result["failure"])
    return result


def _threads(processes: int) -> int:
    """Trainers and engines take turns in a synchronous loop, so each kind may use all cores of its node."""
    return max(1, (os.cpu_count() or 1) // processes)


def _worker_environment(job: PolicyJob) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job.threads_per_worker),
        "KMP_BLOCKTIME": "1",  # threads of the role that waits must not spin on cores that the other needs
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


@contextmanager
def _torn_down(run_id: str, board: Any, hub: Any, slots: Slots) -> Iterator[None]:
    """Whatever happens, this run's apps and group go; a kill -9 of the driver leaves that to the reaper."""
    reaper = start_reaper(run_id, board, slots.group)
    try:
        yield
    finally:
        delete_apps(run_id)
        slots.remove()
        for actor in (reaper, board, hub):  # in a process that keeps its Ray, they would stay as long as it
            ray.kill(actor)


class _StopOnSignal:
    """`ray job stop` sends SIGTERM: leave through every `finally`.

    By KeyboardInterrupt, since Ray's blocking calls let no other exception of a signal handler through.
    """

    def __init__(self) -> None:
        self.received = False

    def __call__(self, _signal: int, _frame: Any) -> None:
        self.received = True
        raise KeyboardInterrupt
