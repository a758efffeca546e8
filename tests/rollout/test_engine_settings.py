"""Arguments of vLLM engines."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.model import Dtype, ModelConfig
from rayrlhf.config.rollout import EngineConfig
from rayrlhf.rollout.engine_settings import MAY_ROUND_PRODUCTS, engine_settings


def arguments(model: Dtype, rollout: Dtype, *, on_gpu: bool = False) -> dict[str, Any]:
    settings = engine_settings(
        ModelConfig(path="m", dtype=model),
        EngineConfig(dtype=rollout),
        seed=0,
        max_model_tokens=256,
        weight_store=None,
        on_gpu=on_gpu,
        threads=1,
    )
    return settings.engine_args


@pytest.mark.parametrize(
    ("model", "rollout", "on_gpu", "may"),
    [
        ("auto", "auto", False, True),
        ("float32", "auto", False, False),
        ("auto", "float32", False, False),
        ("auto", "auto", True, False),
    ],
)
def test_an_engine_rounds_products_where_its_trainer_may(
    model: Dtype, rollout: Dtype, on_gpu: bool, may: bool
) -> None:
    found = arguments(model, rollout, on_gpu=on_gpu)
    assert found.get("additional_config", {}).get(MAY_ROUND_PRODUCTS, False) is may
    assert found["dtype"] == ("bfloat16" if on_gpu else "float32")


def test_arguments_of_the_user_go_to_vllm() -> None:
    rollout = EngineConfig(
        engine_args={"block_size": 64, "max_num_batched_tokens": 512, "cpu_offload_gb": None}
    )
    for on_gpu in (False, True):
        found = engine_settings(
            ModelConfig(path="m"),
            rollout,
            seed=0,
            max_model_tokens=256,
            weight_store=None,
            on_gpu=on_gpu,
            threads=1,
        ).engine_args
        assert (found["block_size"], found["max_num_batched_tokens"]) == (64, 512)
        assert "cpu_offload_gb" not in found, "null is as if it were left out"
    assert arguments("auto", "auto", on_gpu=True)["max_num_batched_tokens"] == 8192, "as in the plan"
