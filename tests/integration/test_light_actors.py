"""A run goes through the deaths of its light actors' processes as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError
from ray.util import placement_group_table

from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.usefixtures("ray_session"),
]

NUM_STEPS = 24  # a fraction of a second each: the run must outlive the last kill
ACTORS = ("weights", "board", "reaper")  # by the end of their name
WAIT_SECONDS = 300


def steps_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def pid_of(actor: Any) -> int:
    """Of the process that is there now, or that comes back."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=WAIT_SECONDS)
        except ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def kill_in_turn(
    names: Sequence[str], run: Path, seconds: dict[str, float], failures: list[BaseException]
) -> None:
    """The process of one actor after every step."""
    try:
        for number, name in enumerate(names, start=1):
            deadline = time.monotonic() + WAIT_SECONDS
            while len(steps_of(run)) < number:
                assert time.monotonic() < deadline, f"step {number} did not come"
                time.sleep(0.05)
            listed: list[Any] = ray.util.list_named_actors(all_namespaces=True)
            [full] = [a["name"] for a in listed if a["name"].endswith(f"-{name}") and "tiny" in a["name"]]
            actor = ray.get_actor(full, namespace=NAMESPACE)
            old = pid_of(actor)
            os.kill(old, signal.SIGKILL)
            started = time.monotonic()
            assert pid_of(actor) != old
            seconds[name] = time.monotonic() - started
    except BaseException as failure:
        failures.append(failure)


def test_28_hub_board_and_reaper_die_and_the_run_ends_with_the_same_losses(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: workers restarted until max_failures when the hub died; the board's death deleted the run's
    apps and placement group, and the metrics thread died with it.
    """
    changes: dict[str, Any] = {
        "train": {"num_steps": NUM_STEPS, "max_failures": 0},
        "rollout": {"prompts_per_step": 8},
        "checkpoint": {"export": False},
        "observe": {"console": "lines", "tensorboard": False},
    }
    runs = tmp_path / "runs"
    assert run_policy(tiny_run(tmp_path, tiny_model, run={"name": "whole"}, **changes)) == 0
    seconds: dict[str, float] = {}
    failures: list[BaseException] = []
    killer = threading.Thread(target=kill_in_turn, args=(ACTORS, runs / "tiny", seconds, failures))
    killer.start()
    code = run_policy(tiny_run(tmp_path, tiny_model, **changes))
    killer.join(WAIT_SECONDS)
    shown = capsys.readouterr().out
    assert code == 0 and not failures, (failures, shown)
    print("seconds until an actor answered again:", seconds)
    whole, hurt = ([step["loss/actor"] for step in steps_of(runs / name)] for name in ("whole", "tiny"))
    assert hurt == whole and len(hurt) == NUM_STEPS
    assert "the weight hub's process died; it has its state again" in shown
    assert "the board's process died; reports that it had not passed on were posted again" in shown
    assert "failed" not in shown and seconds.keys() == set(ACTORS)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_28_the_mailbox_dies_and_both_trainers_go_on_from_the_checkpoint(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds the actor's pending calls to the critic, which cannot be restored. Each side
    restarts once, and a repeated step has the loss that it had before, bit for bit.
    """
    changes: dict[str, Any] = {
        "train": {"num_steps": 3, "max_failures": 1},
        "rollout": {"prompts_per_step": 8},
        "critic": {"lr": 1e-3, "location": "trainer"},
        "checkpoint": {"export": False, "every_steps": 1},
        "observe": {"console": "lines", "tensorboard": False},
    }
    config = tiny_run(tmp_path, tiny_model, **changes)
    run = Path(config.run.path)
    seconds: dict[str, float] = {}
    failures: list[BaseException] = []
    killer = threading.Thread(target=kill_in_turn, args=(["critic"], run, seconds, failures))
    killer.start()
    code = run_policy(config)
    killer.join(WAIT_SECONDS)
    shown = capsys.readouterr().out
    assert code == 0 and not failures, (failures, shown)
    assert "CriticFailed" in shown and "between actor and critic died" in shown
    by_step: dict[int, list[float]] = {}
    again = [row for row in steps_of(run, "superseded.jsonl") if "loss/actor" in row]
    assert again, "no step was made twice"
    for step in (*steps_of(run), *again):
        by_step.setdefault(step["step"], []).append(step["loss/actor"])
    print("losses by step:", by_step)
    assert sorted(by_step) == [1, 2, 3] and all(len(set(losses)) == 1 for losses in by_step.values())
    for checkpoint in (run / "checkpoints").glob("step_*"):
        [shards] = json.loads((checkpoint / "manifest.json").read_text())["elsewhere"]
        assert (checkpoint.parent / shards / "manifest.json").is_file()
