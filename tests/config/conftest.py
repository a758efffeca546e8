"""A complete small configuration, and a loader that takes YAML texts and overrides in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig

SMALL = """\
run: {name: small}
model: {path: models/tiny}
data: {train: prompts.jsonl}
reward:
  sources:
    - {type: function, function: "rewards:length"}
train: {num_steps: 10}
"""

Load = Callable[..., PolicyRunConfig]
Problems = Callable[..., dict[str, Problem]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load("train.lr=1", yaml=[...])`: the small configuration, merged with more YAML, then overridden."""

    def load_texts(*overrides: str, yaml: list[str] | None = None) -> PolicyRunConfig:
        files = []
        for i, text in enumerate([SMALL] if yaml is None else yaml):
            path = tmp_path / f"{i}.yaml"
            path.write_text(text, encoding="utf-8")
            files.append(str(path))
        return load_config(PolicyRunConfig, [*files, *overrides])

    return load_texts


@pytest.fixture
def problems(load: Load) -> Problems:
    """Like `load`, for what must fail: the problems by their path."""

    def problems_of(*overrides: str, yaml: list[str] | None = None) -> dict[str, Problem]:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, yaml=yaml)
        found = caught.value.problems
        assert found, "an error without a problem"
        by_path = {problem.path: problem for problem in found}
        assert len(by_path) == len(found), f"reported twice: {[problem.path for problem in found]}"
        return by_path

    return problems_of
