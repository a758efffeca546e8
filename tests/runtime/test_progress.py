"""One rank's place in a run: what is due, what its clocks hold, how it ends."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import PreemptionInfo

from rayrlhf.reward.client import RewardFailure
from rayrlhf.runtime.progress import AUTO_CHECKPOINT_SECONDS, Checkpoints, Progress, stops_cleanly
from rayrlhf.runtime.results import Stopped
from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train.checkpoint import LoopState
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.manifest import DamagedCheckpoint
from tests.samples import make_config


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, step: int, text: str) -> None:
        self.lines.append(text)

    event = say

    def flush(self) -> None: ...


class Kept:
    """A checkpoint of step 3."""

    def __init__(self) -> None:
        self.saved: list[LoopState] = []
        self.pending: Any = None
        self.completed = 0
        self.notice: str | None = None

    def finish(self) -> None:
        self.completed += 1
        self.pending = None

    def node_to_be_reclaimed(self) -> str | None:
        return self.notice

    def restore(self, saved: Any) -> LoopState:
        return LoopState(step=3, seconds_total=100.0)

    def save(self, state: LoopState, saved: Any, elsewhere: Any) -> None:
        self.saved.append(state)


class RankZeroSaysYes(Ranks):
    """This is rank 1; rank 0 brings `1`."""

    @property
    def rank(self) -> int:
        return 1

    def max(self, value: float) -> float:
        return max(value, 1.0)


def progress(ranks: Ranks | None = None, checkpoints: Any = None, **sections: Any) -> Progress:
    reporter: Any = Log()
    kept: Any = checkpoints if checkpoints is not None else Kept()
    return Progress(make_config(**sections), ranks or Ranks(), reporter, kept)


@pytest.mark.parametrize("failure", [RewardFailure, FloatingPointError, DamagedCheckpoint])
def test_what_a_restart_would_only_repeat_is_a_result(failure: type[Exception]) -> None:
    @stops_cleanly
    def loop() -> int:
        raise failure("why")

    assert loop() == Stopped(f"{failure.__name__}: why")


def test_everything_else_is_raised_or_returned() -> None:
    @stops_cleanly
    def loop(fails: bool) -> int:
        if fails:
            raise TimeoutError("an engine is gone")
        return 7

    assert loop(False) == 7
    with pytest.raises(TimeoutError, match="an engine is gone"):
        loop(True)


def test_a_resumed_run_goes_on_after_its_checkpoint() -> None:
    run = progress(train={"num_steps": 5})
    assert list(run.steps()) == [0, 1, 2, 3, 4]
    run.restore([])
    assert list(run.steps()) == [3, 4]
    log: Any = run.reporter
    assert log.lines == ["resuming after step 3"]
    run.state.step = 5
    assert run.is_last() and list(run.steps()) == []


def test_what_is_due() -> None:
    run = progress(checkpoint={"every_steps": 2})
    due: list[int] = []
    for step in range(1, 7):
        run.state.step = step
        due += [step] if run.checkpoint_is_due() else []
    assert due == [2, 4, 6]
    assert not run.is_due(None) and run.is_due(3)


@pytest.mark.parametrize("every_steps", [None, 100, "auto"])
def test_a_node_that_is_to_be_taken_away_is_a_reason_to_save_once(every_steps: Any) -> None:
    kept = Kept()
    run = progress(checkpoints=kept, checkpoint={"every_steps": every_steps})
    run.state.step = 1
    assert not run.checkpoint_is_due()
    kept.notice = "the node of rank 1 is to be taken away in 90 s"
    assert run.checkpoint_is_due() and not run.checkpoint_is_due()
    log: Any = run.reporter
    assert log.lines == [
        "the node of rank 1 is to be taken away in 90 s: saving a checkpoint, from which the run goes on "
        "with another node"
    ]


def test_rays_notice_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(LocalFolder(Path("checkpoints")), Path("scratch"))
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    assert checkpoints.node_to_be_reclaimed() is None
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [3, 2], "b": [7]})
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: info)
    assert checkpoints.node_to_be_reclaimed() == "the node of rank 2, 3, 7 is to be taken away"
    soon = replace(info, deadline_ms=int((time.time() + 90) * 1000))
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: soon)
    assert "is to be taken away in 9" in f"{checkpoints.node_to_be_reclaimed()}"


def test_with_auto_the_clock_of_rank_0_decides() -> None:
    alone = progress(checkpoint={"every_steps": "auto"})
    assert not alone.checkpoint_is_due()
    alone.saved_at -= AUTO_CHECKPOINT_SECONDS
    assert alone.checkpoint_is_due()
    assert progress(RankZeroSaysYes(), checkpoint={"every_steps": "auto"}).checkpoint_is_due()


def test_one_in_the_background_is_completed_as_soon_as_all_ranks_are_ready() -> None:
    kept = Kept()
    run = progress(checkpoints=kept, checkpoint={"every_steps": None})
    kept.pending = SimpleNamespace(is_ready=False)
    assert not run.checkpoint_is_due() and kept.completed == 0
    kept.pending = SimpleNamespace(is_ready=True)
    assert not run.checkpoint_is_due() and kept.completed == 1 and kept.pending is None
    run.checkpoint_is_due()
    assert kept.completed == 1
    run.save([])
    assert kept.completed == 1, "it goes on in the background"
    run.result(after={}, export=None)
    assert kept.completed == 2


def test_the_clocks_go_on_over_a_restart() -> None:
    kept = Kept()
    run = progress(checkpoints=kept)
    run.restore([])
    run.timer.seconds["rollout"] += 2.0
    assert run.step_seconds()["time/rollout"] == 2.0
    run.timer.seconds["eval"] += 1.0
    run.started -= 10.0
    run.save([])
    [state] = kept.saved
    assert state.seconds_per_phase == {"rollout": 2.0, "eval": 1.0}
    assert state.seconds_total == pytest.approx(110.0, abs=1.0)
    result = run.result(after={"metrics": {}}, export=None)
    assert (result.steps, result.seconds_total) == (3, pytest.approx(110.0, abs=1.0))
    assert result.seconds_per_phase == state.seconds_per_phase
