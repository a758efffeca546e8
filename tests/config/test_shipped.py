"""Every configuration that the repository ships is valid and points at things that exist."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from rayrlhf.config.load import dump_resolved, load_config
from rayrlhf.config.reward import FunctionSource
from rayrlhf.config.run import PolicyRunConfig

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {path.name for path in SHIPPED} >= {"demo.yaml"} and len(SHIPPED) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_it_loads_and_its_resolved_form_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(PolicyRunConfig, [str(path)])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(PolicyRunConfig, [str(resolved)]) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_its_reward_functions_exist(path: Path) -> None:
    for source in load_config(PolicyRunConfig, [str(path)]).reward.sources:
        if isinstance(source, FunctionSource):
            module, _, name = source.function.partition(":")
            if module.endswith(".py"):
                module = module.removesuffix(".py").replace("/", ".")
            assert callable(getattr(importlib.import_module(module), name))
