"""TorchTrainer whose workers run on given slots of the run's placement group.

Ray Train has no public API for an existing placement group: it creates its own, which would separate the
trainer from the engines that share its GPUs. This subclass overrides six internals of Ray 2.60 (pinned;
tests/placement has a contract test that fails when one of them changes):
`DataParallelTrainer._initialize_and_run_controller` and `._create_default_callbacks`, and with
`slot_controller` `TrainController.worker_group_cls` and `._health_check_interval_s`,
`WorkerGroup._create_placement_group` and `._create_workers`.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from rayrlhf.placement.slot_controller import SlotController, SlotScalingConfig, controller_runtime_env
from rayrlhf.placement.slots import Slots

CONTROLLER_SECONDS = 60.0
TRAINERS = ("actor", "critic")  # roles trained by this trainer


class SlotTorchTrainer(TorchTrainer):
    controller: Any = None

    def abort(self) -> None:
        """End `fit()` from another thread: it raises, and the workers die with their controller."""
        deadline = time.monotonic() + CONTROLLER_SECONDS
        while self.controller is None and time.monotonic() < deadline:
            time.sleep(0.1)  # `fit()` has just started
        if self.controller is not None:
            ray.kill(self.controller)

    def _create_default_callbacks(self) -> Any:
        # Ray's cleaner would remove the group when the trainer ends, while the engines still use it.
        return [
            c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)
        ]

    def _initialize_and_run_controller(self, **controller_arguments: Any) -> Any:
        driver_node = ray.get_runtime_context().get_node_id()
        controller: Any = (
            ray.remote(SlotController)
            .options(
                num_cpus=0,
                label_selector={RAY_NODE_ID_KEY: driver_node},
                runtime_env=controller_runtime_env(),
            )
            .remote(**controller_arguments)
        )
        self.controller = controller
        # Ray would register its own handler for Ctrl-C here, which ends the driver by `sys.exit(0)`: silently
        # and with the exit code of success. Python's handler raises KeyboardInterrupt instead, and then the
        # workers die with their controller.
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        except KeyboardInterrupt:
            ray.kill(controller)
            raise


def slot_scaling(slots: Slots, role: str) -> SlotScalingConfig:
    """The scaling config that places this role's workers on their slots."""
    plan = slots.spec.of(role)
    pool = next(pool for pool in slots.spec.pools if plan in pool.roles)
    trainers = sum(other.role in TRAINERS for other in pool.roles)  # engines and replicas request no CPU
    resources = {"CPU": slots.spec.cpus_per_slot / trainers}
    if slots.gpus_per_slot:
        resources["GPU"] = plan.gpu_share * slots.gpus_per_slot
    return SlotScalingConfig(
        num_workers=len(plan.slots),
        use_gpu=slots.gpus_per_slot > 0,
        resources_per_worker=resources,
        group=slots.group,
        bundles=tuple(slots.table[index].bundle for index in plan.slots),
    )
