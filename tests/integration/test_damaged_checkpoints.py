"""A run whose newest checkpoint and whose record of checkpoints are damaged resumes from the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.supervised.driver import run_supervised
from rayrlhf.train.checkpoint import RECORD
from tests.integration import supervised_data as made
from tests.integration.test_supervised import job, logged
from tests.train.checkpoints import cut

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def test_29_31_the_newest_whole_one_is_taken_and_nothing_is_left_in_scratch(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step after it has the loss that it had before the damage, bit for bit."""
    made.write(tmp_path / "train.jsonl", made.conversations(64))
    made.write(tmp_path / "eval.jsonl", made.conversations(8, seed=1))

    def sft(steps: int) -> Any:
        return job(
            tmp_path,
            tiny_model,
            "sft",
            train={"num_steps": steps},
            checkpoint={"every_steps": 1, "export": False},
            eval={"every_steps": 2},
        )

    assert run_supervised(sft(3)) == 0
    run = Path(sft(3).run.path)
    storage = run / "checkpoints"
    assert sorted(path.name for path in storage.glob("step_*")) == ["step_000002", "step_000003"]
    assert not (run / "scratch").exists() and (run / "best" / "config.json").is_file()

    before = logged(sft(3), "loss/model")
    assert len(before) == 3
    [states] = (storage / "step_000003").rglob("*model_states.pt")
    cut(states)
    (storage / RECORD).write_bytes(b"\0\xff" * 100)
    (run / "scratch" / "rayrlhf-sft-abc" / "step_000003.partial").mkdir(parents=True)  # of a crash
    capsys.readouterr()
    assert run_supervised(sft(4)) == 0
    shown = capsys.readouterr().out
    assert "warning: checkpoint step_000003 is damaged: " in shown and "model_states.pt has" in shown
    assert f"Ray Train's {RECORD} cannot be read" in shown
    assert "resuming from step 2, the newest intact checkpoint" in shown and "Traceback" not in shown
    assert logged(sft(4), "loss/model")[:3] == before
    assert '"step": 3' in (run / "superseded.jsonl").read_text(), "the third step was repeated"
    assert sorted(path.name for path in storage.glob("step_*")) == ["step_000003", "step_000004"]
    assert not (run / "scratch").exists() and (run / "best" / "config.json").is_file()
