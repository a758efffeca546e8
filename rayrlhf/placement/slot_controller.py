"""Ray Train's controller and worker group on given slots: what `trainer` runs in the controller's process.

The process imports this module only; the trainer's would cost it seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train import ScalingConfig
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup

from rayrlhf.placement.preload import is_enabled

POLLS_PER_SECOND = 50


@dataclass
class SlotScalingConfig(ScalingConfig):
    group: PlacementGroup | None = None
    bundles: tuple[int, ...] = ()  # bundle of each worker, by rank


class _BorrowedGroup(DefaultPlacementGroupHandle):
    def shutdown(self) -> None:
        """Keep the group: it belongs to the run, and a restarting worker group needs it."""


class SlotWorkerGroup(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        return _BorrowedGroup(scaling_config.group)

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not args and kwargs.get("placement_group_bundle_indices") is None:
            scaling: Any = self._train_run_context.scaling_config
            bundles: tuple[int, ...] = scaling.bundles
            kwargs["placement_group_bundle_indices"] = list(bundles[:num_workers])
        return super()._create_workers(num_workers, placement_group, resources_per_worker, *args, **kwargs)


class SlotController(TrainController):
    worker_group_cls = SlotWorkerGroup

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        workers = self._train_run_context.scaling_config.num_workers
        assert isinstance(workers, int), "slots are fixed"
        self._health_check_interval_s = poll_interval(workers, least=self._health_check_interval_s)


def poll_interval(num_workers: int, *, least: float) -> float:
    """Seconds between polls of all workers: the controller makes one call per worker, 50 per second at most.

    A checkpoint's report, and the death of a worker, wait for the next poll: 10 s with 512 workers.
    """
    return max(least, num_workers / POLLS_PER_SECOND)


def train_variables() -> dict[str, str]:
    """Environment variables that Ray Train passes to its controller, and the controller to its workers."""
    env_vars = get_env_vars_to_propagate()
    env_vars.setdefault(
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
    )
    return env_vars


def controller_runtime_env() -> dict[str, Any]:
    """Empty on a local Ray, whose processes have inherited the variables: the controller, and the actors that
    it creates, then get processes that were started in advance.
    """
    return {} if is_enabled() else {"env_vars": train_variables()}
