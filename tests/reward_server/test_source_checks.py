"""What of a reward server is refused before Ray starts, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.parse import load_config
from rayrlhf.config.serve_reward import ServeRewardConfig
from rayrlhf.reward.items import RewardError
from rayrlhf.reward_server.requests import ModelFacts
from rayrlhf.reward_server.source_checks import check_sources
from rayrlhf.runtime.preflight import InputError
from tests.reward_export import MEAN, STD, make_reward_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield make_reward_export(tmp_path_factory.mktemp("rm"))


def config(*sources: dict[str, Any], **sections: Any) -> ServeRewardConfig:
    return ServeRewardConfig.model_validate({"reward": {"sources": list(sources)}, **sections})


def model(path: str, **options: Any) -> dict[str, Any]:
    return {"type": "model", "path": path, **options}


def test_what_the_server_knows_of_a_model(export: str) -> None:
    raw, normal = check_sources(config(model(export), model(export, normalize=True, max_tokens=64)))
    longest = len("<|assistant|>")  # the tiny tokenizer's others are bytes
    assert raw.facts == ModelFacts(512, is_decoder=True, characters_per_token=longest)
    assert normal.facts == ModelFacts(64, True, mean=MEAN, std=STD, characters_per_token=longest)
    assert [raw.name, normal.name] == ["reward0", "reward1"]


def test_a_language_model_is_no_reward_model(tiny_model: str, export: str) -> None:
    with pytest.raises(InputError, match=r"reward\.sources\.1\.path=.*LlamaForCausalLM.*num_labels=1"):
        check_sources(config(model(export), model(tiny_model)))


def test_what_does_not_fit_the_model_is_named(export: str) -> None:
    with pytest.raises(InputError, match=r"sources\.0\.max_tokens=513: the model has 512 positions"):
        check_sources(config(model(export, max_tokens=513)))
    with pytest.raises(InputError, match=r"reward\.sources\.0\.path=nowhere/at/all: no such folder"):
        check_sources(config(model("nowhere/at/all")))


@pytest.mark.parametrize("std", [None, 0.0, "wide"])
def test_normalising_needs_mean_and_std(tmp_path: Path, std: Any) -> None:
    path = make_reward_export(tmp_path)
    file = Path(path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"std": std}))
    with pytest.raises(InputError, match=r"sources\.0\.normalize=true: .*wanted the mean"):
        check_sources(config(model(path, normalize=True)))


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(RewardError, match=r"reward\.sources\.0\.function: .*no_such_module"):
        check_sources(config({"type": "function", "function": "no_such_module:f"}))


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("server.route=get_reward", "server.route"),
        ("server.route=/", "server.route"),
        ("server.route=/reward/", "server.route"),
        ("server.port=70000", "server.port"),
        ("reward.sources.0.type=remote", "reward.sources.0.type"),
        ("reward.sources.0.on_long=cut", "reward.sources.0.on_long"),
        ("reward.sources=[]", "reward.sources"),
        ("job=ppo", "job"),
    ],
)
def test_keys_are_strict(override: str, path: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("job: serve_reward\nreward: {sources: [{type: model, path: rm}]}\n")
    assert load_config(ServeRewardConfig, [str(file)]).server.route == "/get_reward"
    with pytest.raises(ConfigError) as caught:
        load_config(ServeRewardConfig, [str(file), override])
    assert [problem.path for problem in caught.value.problems] == [path]
