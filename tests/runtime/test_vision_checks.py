"""Settings with which a vision-language model's images would be lost are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.supervised import JOBS
from rayrlhf.runtime.architecture_checks import check_architectures
from tests.integration.policy_runs import tiny_run
from tests.tiny_vision import make_tiny_vision


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_vision(tmp_path_factory.mktemp("vision") / "model")


def refused(config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_architectures(config, print)
    return str(caught.value)


def test_a_supported_run_is_not_worth_a_line(model: str, tmp_path: Path) -> None:
    said: list[str] = []
    check_architectures(tiny_run(tmp_path, model), said.append)
    assert said == []


CASES: dict[str, dict[str, Any]] = {
    "model.sequence_parallel": {
        "model": {"sequence_parallel": 2},
        "train": {"num_workers": 2},
    },
    "model.quantization": {"model": {"quantization": "nf4", "lora": {}}},
    "ref.engine": {"ref": {"engine": "vllm", "location": "serve"}},
    "reward.sources.0.type": {"reward": {"sources": [{"type": "model", "path": "TEXT"}]}},
    "critic.path": {"critic": {"path": "TEXT"}},
    "ref.path": {"ref": {"path": "TEXT"}},
    "rollout.environment": {
        "rollout": {
            "environment": {"environment": "tests.jobs.environments:Guess", "max_response_tokens": 64}
        },
        "reward": {"sources": [{"type": "environment"}]},
    },
}


@pytest.mark.parametrize("key", CASES)
def test_refusals_name_the_key(model: str, tiny_model: str, tmp_path: Path, key: str) -> None:
    def given(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: given(item) for name, item in value.items()}
        if isinstance(value, list):
            return [given(item) for item in value]
        return tiny_model if value == "TEXT" else value

    message = refused(tiny_run(tmp_path, model, **given(CASES[key])))
    assert key in message and "qwen2_5_vl" in message and "fix:" in message, message


@pytest.mark.parametrize("job", ["rm", "prm", "kd"])
def test_jobs_without_images(model: str, tmp_path: Path, job: str) -> None:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "model": {"path": model},
        "data": {"train": "none.jsonl"} | ({"step_token": "<|extra|>"} if job == "prm" else {}),
    }
    if job == "kd":
        tree["teacher"] = {"path": model}
    assert f"a qwen2_5_vl with job: {job}" in refused(JOBS[job].model_validate(tree))


def test_a_policy_without_vision_and_a_critic_with_it(model: str, tiny_model: str, tmp_path: Path) -> None:
    message = refused(tiny_run(tmp_path, tiny_model, critic={"path": model}))
    assert "model.path" in message and "would not see the images" in message
