"""Weight transfer backends by the placement of engines and actors."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.placement.plan import plan_placement
from rayrlhf.weights.backend import weight_route
from tests.integration.policy_runs import tiny_run


def route(
    folder: Path, preset: str, *, backend: str = "auto", have_gpus: bool = True, workers: int = 1
) -> str:
    config = tiny_run(
        folder,
        "model",
        placement={"preset": preset},
        rollout={"weight_sync": {"backend": backend}},
        train={"num_workers": workers},
    )
    return weight_route(config, plan_placement(config), have_gpus=have_gpus)


@pytest.mark.parametrize(
    "preset, have_gpus, expected",
    [
        ("colocate_all", True, "ipc"),
        ("disaggregated", True, "nccl"),
        ("colocate_actor_ref", True, "nccl"),
        ("colocate_all", False, "object_store"),
        ("disaggregated", False, "object_store"),
    ],
)
def test_auto_takes_the_fastest_backend(preset: str, have_gpus: bool, expected: str, tmp_path: Path) -> None:
    assert route(tmp_path, preset, have_gpus=have_gpus, workers=2) == expected


@pytest.mark.parametrize("backend", ["gloo", "object_store"])
@pytest.mark.parametrize("preset", ["colocate_all", "disaggregated"])
def test_some_backends_work_with_every_placement(preset: str, backend: str, tmp_path: Path) -> None:
    assert route(tmp_path, preset, backend=backend, have_gpus=False) == backend


def test_backends_on_the_slots_they_need(tmp_path: Path) -> None:
    assert route(tmp_path, "colocate_all", backend="ipc", have_gpus=False) == "ipc"
    assert route(tmp_path, "disaggregated", backend="nccl") == "nccl"


@pytest.mark.parametrize(
    "preset, backend, have_gpus, expected",
    [
        ("disaggregated", "ipc", True, r"ipc with placement\.preset=disaggregated"),
        ("colocate_all", "nccl", True, r"nccl with placement\.preset=colocate_all"),
        ("disaggregated", "nccl", False, "nccl without GPUs"),
    ],
)
def test_a_backend_that_the_placement_does_not_support_is_refused(
    preset: str, backend: str, have_gpus: bool, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.weight_sync\.backend\s+got: +{expected}"):
        route(tmp_path, preset, backend=backend, have_gpus=have_gpus)
