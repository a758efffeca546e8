"""The six internals of Ray Train that rayrlhf.placement.trainer overrides exist and are called as expected.

When one of these fails after an upgrade of Ray: read the named method in the new Ray, change the override in
rayrlhf/placement/trainer.py, then this test, and then move the pin of ray in pyproject.toml.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import placement_group_handle
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from rayrlhf.placement import slot_controller
from rayrlhf.placement import trainer as ours

LOOK = "Ray Train has changed: see {}, then rayrlhf/placement/trainer.py, which overrides it"


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def calls(caller: Callable[..., Any], callee: str) -> bool:
    """Whether the source of `caller` contains the overridden name."""
    return callee in inspect.getsource(caller)


def test_the_trainer_is_train_v2s() -> None:
    assert issubclass(TorchTrainer, DataParallelTrainer), (
        "RAY_TRAIN_V2_ENABLED=1 must be set before ray.train is imported"
    )


def test_the_controller_is_started_with_keyword_arguments() -> None:
    look = LOOK.format("DataParallelTrainer._initialize_and_run_controller")
    [_, arguments] = parameters(DataParallelTrainer._initialize_and_run_controller).values()
    assert arguments.kind is inspect.Parameter.VAR_KEYWORD, look
    assert calls(DataParallelTrainer.fit, "_initialize_and_run_controller("), look
    for method in ("run", "get_result"):
        # Ray adds its own argument once a class has been made an actor in this process.
        assert [p for p in parameters(getattr(TrainController, method)) if not p.startswith("_ray")] == [
            "self"
        ]
    assert list(parameters(DataParallelTrainer._register_sigint_handler)) == ["self", "controller"], look
    body = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    for copied in (
        "get_env_vars_to_propagate()",
        "num_cpus=0",
        "RAY_NODE_ID_KEY",
        "controller.get_result.remote()",
    ):
        assert copied in body, look


def test_the_default_callbacks_contain_the_removed_cleaner() -> None:
    look = LOOK.format("DataParallelTrainer._create_default_callbacks")
    assert list(parameters(DataParallelTrainer._create_default_callbacks)) == ["self"], look
    assert calls(DataParallelTrainer.fit, "_create_default_callbacks()"), look


def test_only_the_cleaner_is_removed(tmp_path: Path) -> None:
    def callbacks(trainer_class: type[TorchTrainer]) -> list[type]:
        trainer = trainer_class(
            print,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(tmp_path)),
        )
        return [type(callback) for callback in trainer._create_default_callbacks()]

    rays = callbacks(TorchTrainer)
    assert rays.count(PlacementGroupCleanerCallback) == 1, LOOK.format(
        "DataParallelTrainer._create_default_callbacks"
    )
    rays.remove(PlacementGroupCleanerCallback)
    assert callbacks(ours.SlotTorchTrainer) == rays


def test_the_controller_makes_its_worker_group_from_the_class_attribute() -> None:
    look = LOOK.format("TrainController.worker_group_cls")
    assert TrainController.worker_group_cls is WorkerGroup, look
    assert calls(TrainController, "self.worker_group_cls.create("), look
    assert slot_controller.SlotController.worker_group_cls is slot_controller.SlotWorkerGroup


def test_the_controller_polls_its_workers_in_an_interval_that_is_an_attribute() -> None:
    look = LOOK.format("TrainController._poll_workers")
    assert calls(TrainController.__init__, "self._health_check_interval_s = float("), look
    assert calls(TrainController._poll_workers, "await asyncio.sleep(remaining_time)"), look
    assert calls(TrainController._poll_workers, "poll_status(timeout=self._health_check_interval_s)"), look


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.5), (25, 0.5), (100, 2.0), (500, 10.0)])
def test_many_workers_are_polled_less_often(
    workers: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(controller: Any, context: Any) -> None:
        controller._train_run_context = context
        controller._health_check_interval_s = 0.5

    monkeypatch.setattr(TrainController, "__init__", init)
    context = SimpleNamespace(scaling_config=ScalingConfig(num_workers=workers))
    controller = slot_controller.SlotController(context)  # pyright: ignore[reportArgumentType]
    assert controller._health_check_interval_s == seconds


def test_the_worker_group_creates_its_placement_group() -> None:
    look = LOOK.format("WorkerGroup._create_placement_group")
    expected = ["self", "scaling_config", "worker_group_context"]
    assert list(parameters(WorkerGroup._create_placement_group)) == expected, look
    assert list(parameters(slot_controller.SlotWorkerGroup._create_placement_group)) == expected
    assert calls(WorkerGroup, "self._create_placement_group("), look


def test_the_worker_group_creates_its_workers() -> None:
    look = LOOK.format("WorkerGroup._create_workers")
    expected = [
        "self",
        "num_workers",
        "placement_group",
        "resources_per_worker",
        "placement_group_bundle_indices",
    ]
    actual = parameters(WorkerGroup._create_workers)
    assert list(actual)[:5] == expected, look
    assert actual["placement_group_bundle_indices"].default is None, look
    assert calls(WorkerGroup, "self._create_workers("), look
    assert "self._train_run_context = train_run_context" in inspect.getsource(WorkerGroup.__init__), look


def test_a_borrowed_group_is_used_but_never_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Any] = []
    monkeypatch.setattr(placement_group_handle, "remove_placement_group", removed.append)
    group: Any = SimpleNamespace(ready=lambda: "a ref", wait=lambda timeout_seconds: True)
    handle = slot_controller._BorrowedGroup(group)
    assert handle.placement_group is group and handle.ready() == "a ref" and handle.wait(1)
    handle.shutdown()
    assert removed == []
    placement_group_handle.DefaultPlacementGroupHandle(group).shutdown()
    assert removed == [group], "the patched function is not called"


def test_workers_run_on_the_bundles_of_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles: list[Any] = []
    signature = inspect.signature(WorkerGroup._create_workers)

    def create(*arguments: Any, **keywords: Any) -> None:
        bundles.append(signature.bind(*arguments, **keywords).arguments["placement_group_bundle_indices"])

    monkeypatch.setattr(WorkerGroup, "_create_workers", create)
    group = object.__new__(slot_controller.SlotWorkerGroup)
    scaling = ours.SlotScalingConfig(num_workers=3, bundles=(4, 0, 2))
    monkeypatch.setattr(group, "_train_run_context", SimpleNamespace(scaling_config=scaling), raising=False)
    resources = {"CPU": 1.0}
    group._create_workers(3, None, resources, replica_group_size=None)
    group._create_workers(2, None, resources)
    # A single lost worker that Ray replaces has its own bundle, which must not be changed.
    group._create_workers(1, None, resources, placement_group_bundle_indices=[2])
    group._create_workers(1, None, resources, [2])
    assert bundles == [[4, 0, 2], [4, 0], [2], [2]]
