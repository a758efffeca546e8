"""A run whose newest checkpoint and whose record of checkpoints are damaged goes on from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.loops.run_supervised import run_supervised
from rayrlhf.train.checkpoint import RECORD
from tests.integration import supervised_data as made
from tests.integration.test_supervised import job, logged
from tests.train.checkpoints import cut

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_29_31_the_newest_whole_one_is_taken_and_nothing_is_left_in_scratch(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses are bit for bit those of a run that nothing has happened to."""
    made.write(tmp_path / "train.jsonl", made.conversations(64))
    made.write(tmp_path / "eval.jsonl", made.conversations(8, seed=1))

    def sft(name: str, steps: int) -> int:
        changes = {"train": {"num_steps": steps}, "checkpoint": {"every_steps": 1, "export": False}}
        config = job(tmp_path, tiny_model, "sft", run={"name": name}, eval={"every_steps": 2}, **changes)
        return run_supervised(config)

    assert sft("whole", 4) == 0
    assert sft("hurt", 3) == 0
    hurt = tmp_path / "runs" / "hurt"
    storage = hurt / "checkpoints"
    assert sorted(path.name for path in storage.glob("step_*")) == ["step_000002", "step_000003"]
    assert not (hurt / "scratch").exists() and (hurt / "best" / "config.json").is_file()

    [states] = (storage / "step_000003").rglob("*model_states.pt")
    cut(states)
    (storage / RECORD).write_bytes(b"\0\xff" * 100)
    (hurt / "scratch" / "rayrlhf-hurt-abc" / "step_000003.partial").mkdir(parents=True)  # of a crash
    capsys.readouterr()
    assert sft("hurt", 4) == 0
    shown = capsys.readouterr().out
    assert "warning: checkpoint step_000003 is damaged: " in shown and "model_states.pt has" in shown
    assert f"Ray Train's {RECORD} cannot be read" in shown
    assert "going on from step 2, the newest whole checkpoint" in shown and "Traceback" not in shown
    losses = {name: logged(job(tmp_path, tiny_model, "sft", run={"name": name}), "loss/model")
              for name in ("whole", "hurt")}  # fmt: skip
    assert losses["hurt"][-2:] == losses["whole"][-2:]
    assert len(losses["hurt"]) == 3 + 2
    assert sorted(path.name for path in storage.glob("step_*")) == ["step_000003", "step_000004"]
    assert not (hurt / "scratch").exists() and (hurt / "best" / "config.json").is_file()
