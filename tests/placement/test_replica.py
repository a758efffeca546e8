"""Environment of tensor-parallel engines."""

from __future__ import annotations

from rayrlhf.placement.replica import tensor_parallel_env
from rayrlhf.placement.slots import Slot


def slot(bundle: int) -> Slot:
    return Slot(bundle, node="a", gpu=str(bundle), gpu_uuid=f"GPU-{bundle}", gpu_share=0.25)


def test_an_engine_of_one_slot_has_no_extra_environment() -> None:
    assert tensor_parallel_env([slot(3)]) == {}


def test_workers_run_on_the_bundles_of_their_slots() -> None:
    assert tensor_parallel_env([slot(5), slot(2)]) == {
        "VLLM_RAY_BUNDLE_INDICES": "5,2",
        "VLLM_RAY_PER_WORKER_GPUS": "0.25",
    }
