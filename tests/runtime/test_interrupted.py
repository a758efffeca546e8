"""The message after Ctrl-C says where the next start resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.runtime import run as driver
from rayrlhf.runtime.interrupted import resume_message
from tests.samples import make_config


def config_in(folder: Path, **changes: Any) -> PolicyRunConfig:
    return make_config(run={"name": "demo", "dir": str(folder)}, train={"num_steps": 8}, **changes)


def save_step(folder: Path, step: int) -> None:
    checkpoints = folder / "demo" / "checkpoints"
    (checkpoints / f"step_{step:06d}").mkdir(parents=True)
    newest = {"checkpoint_dir_name": f"step_{step:06d}", "metrics": {"step": step, "first_prompt_batch": 0}}
    (checkpoints / "checkpoint_manager_snapshot.json").write_text(
        json.dumps({"latest_checkpoint_result": newest})
    )


@pytest.mark.parametrize(("setting", "said"), [("auto", "auto"), (5, "5"), (None, "null")])
def test_nothing_is_saved_yet(tmp_path: Path, setting: Any, said: str) -> None:
    config = config_in(tmp_path, checkpoint={"every_steps": setting})
    assert resume_message(config) == (
        f"nothing is saved yet (checkpoint.every_steps={said}): the same command starts from the beginning"
    )


def test_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 6)
    assert resume_message(config_in(tmp_path)) == "the same command resumes from step 6 of 8"


def test_ctrl_c_is_an_exit_code_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "pin", lambda config, _: config)  # its model is nowhere
    config = config_in(tmp_path)
    with driver.DriverRun(config) as run:
        run.pinned(config)
        raise KeyboardInterrupt
    assert run.exit_code == 130
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error interrupted; nothing is saved yet (checkpoint.every_steps=auto)")
