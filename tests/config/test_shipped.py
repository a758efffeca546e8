"""Every configuration that the repository ships is valid and points at things that exist."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.job_kinds import SCHEMAS, load_any, script_of
from rayrlhf.config.parse import dump_resolved
from rayrlhf.config.reward import FunctionSource

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


def load(path: Path) -> Any:
    return load_any([str(path)])


def test_every_job_has_a_config() -> None:
    assert {getattr(load(path), "job", None) for path in SHIPPED} == SCHEMAS.keys()


def test_every_job_has_a_file() -> None:
    for path in SHIPPED:
        assert (REPOSITORY / script_of(load(path))).is_file()


def test_there_are_some() -> None:
    assert {path.name for path in SHIPPED} >= {"demo.yaml"} and len(SHIPPED) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_it_loads_and_its_resolved_form_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    config = load(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(config), encoding="utf-8")
    assert load(resolved) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_its_reward_functions_exist(path: Path) -> None:
    reward = getattr(load(path), "reward", None)
    for source in reward.sources if reward else ():
        if isinstance(source, FunctionSource):
            module, _, name = source.function.partition(":")
            if module.endswith(".py"):
                module = module.removesuffix(".py").replace("/", ".")
            assert callable(getattr(importlib.import_module(module), name))
