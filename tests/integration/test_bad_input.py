"""Each mistake gives one clear error that names the fix, exit code 2, and leaves nothing running."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run
from tests.train.checkpoints import leave_checkpoint

pytestmark = pytest.mark.ray

GOOD_ROW = json.dumps({"prompt": "say something"})


def data(folder: Path, *lines: str) -> dict[str, Any]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return {"data": {"train": str(path), "max_prompt_tokens": 64}}


def reward(name: str) -> dict[str, Any]:
    return {
        "reward": {"sources": [{"type": "function", "function": f"tests.integration.bad_rewards:{name}"}]}
    }


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "missing model path": (
        lambda folder: {"model": {"path": str(folder / "no-model")}},
        ["model.path", "no-model", "no such folder", "checkpoint folder"],
    ),
    "folder without a model": (
        lambda folder: {"model": {"path": str(folder)}},
        ["model.path", "config.json"],
    ),
    "broken JSON line": (
        lambda folder: data(folder, GOOD_ROW, '{"prompt": "half'),
        ["prompts.jsonl:2", "JSON", "on_bad_row"],
    ),
    "missing column": (
        lambda folder: data(folder, json.dumps({"question": "?", "answer": "!"})),
        ["prompt", "question", "answer", "data.prompt_key"],
    ),
    "empty data set": (lambda folder: data(folder), ["prompts.jsonl", "empty"]),
    "long prompt": (
        lambda folder: data(folder, GOOD_ROW, json.dumps({"prompt": "x" * 500})),
        ["prompts.jsonl:2", "data.max_prompt_tokens=64", "drop or truncate"],
    ),
    "no such reward function": (
        lambda _: reward("nowhere"),
        ["reward.sources.0.function", "nowhere", "raises"],
    ),
    "reward raises": (
        lambda _: reward("raises"),
        ["reward.sources.0.function", "ZeroDivisionError", "no vowels"],
    ),
    "reward of wrong length": (lambda _: reward("too_few"), ["returned 1 rewards for 2 responses"]),
    "reward NaN": (lambda _: reward("not_a_number"), ["only NaN or None"]),
    "too many slots": (
        lambda _: {"placement": {"preset": "disaggregated"}, "rollout": {"num_engines": 400}},
        [
            "placement.preset=disaggregated",
            "needs 202 CPU",
            "403 slots x 0.5",
            "the cluster has 4",
            "colocate_all",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str, tmp_path: Path, tiny_model: str, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, wanted = CASES[case]
    assert run_policy(tiny_run(tmp_path, tiny_model, **changes(tmp_path))) == 2
    shown = capsys.readouterr().err
    for words in wanted:
        assert words in shown, shown
    assert "Traceback" not in shown
    states = {group["state"] for group in placement_group_table().values()}
    assert states <= {"REMOVED"}, "no placement group may be left"
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    assert [actor for actor in named if "tiny" in actor["name"]] == []


def test_resume_never_refuses_a_used_folder(
    tmp_path: Path, tiny_model: str, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_checkpoint(tmp_path / "runs" / "tiny" / "checkpoints", 4)
    changes = {"run": {"resume": "never"}}
    assert run_policy(tiny_run(tmp_path, tiny_model, **changes)) == 2
    assert "run.resume=never" in capsys.readouterr().err
