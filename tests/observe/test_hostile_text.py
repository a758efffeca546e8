"""Number 21: console and summary of a run whose responses, rewards and rows steer terminals. Before, each of
these printed the codes raw, and `:smile:` as a picture.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console as PlainConsole

from rayrlhf.config.base import ConfigError
from rayrlhf.config.parse import load_or_exit
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.rows.row import DataError
from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.rows import RowsProgress
from rayrlhf.observe.summary import show_summary
from rayrlhf.runtime import run as driver
from rayrlhf.runtime.run import DriverRun, RunFailed
from rayrlhf.terminal import SafeConsole
from tests.hostile_text import HOSTILE, assert_harmless
from tests.samples import make_config

Captured = pytest.CaptureFixture[str]
POLICY = {
    "reward_before": 0.1,
    "reward_before_ci": [0.0, 0.2],
    "reward_after": 0.5,
    "reward_after_ci": [0.4, 0.6],
    "best": None,
    "steps": 3,
    "seconds_total": 4.0,
    "seconds_per_phase": {"rollout": 3.0},
    "export": f"/runs/{HOSTILE}/export",
    "samples": [
        {"prompt": HOSTILE, "before": HOSTILE, "after": "ok", "reward_before": 0.0, "reward_after": 1.0},
        {
            "prompt": [{"role": "user", "content": HOSTILE}],
            "before": "x",
            "after": "y" * 50_000,
            "reward_before": 0.0,
            "reward_after": 1.0,
        },
    ],
}
GENERATION = {
    **dict.fromkeys(
        ("rows", "samples", "failed_rows", "truncated_samples", "prompt_tokens", "response_tokens"), 1
    ),
    "left_out": {HOSTILE: 2},
    "score_mean": None,
    "response_tokens_per_second": 1.0,
    "seconds": 1.0,
    "shown": [{"prompt": HOSTILE, "response": HOSTILE, "score": 1.0}],
    "output": HOSTILE,
}
CHAIN = {"job": "iterative_dpo", "rounds": [], "last": None, "export": HOSTILE}


@pytest.mark.parametrize("mode", ["lines", "live"])
def test_21_the_console(mode: str, capsys: Captured) -> None:
    console = Console(mode)
    console.start(2)
    for kind in ("phase", "warning"):
        console.write(Report(kind, 0, HOSTILE))
    console.say(f"placed {HOSTILE}")
    console.close()
    with RowsProgress(console, total=2, done=0) as progress:
        progress.update(HOSTILE)
    console.error(f"training failed: {HOSTILE}")
    output = capsys.readouterr()
    assert r"\x1b]52;c;cm0gLXJmIH4=\x07" in output.out and ":smile:" in output.out and "[/nope]" in output.out
    assert_harmless(output.out)
    assert_harmless(output.err)
    assert output.err.startswith(r"error training failed: \x1b]0;pwned\x07")


def test_21_a_warning_is_one_line(capsys: Captured) -> None:
    """It cannot write a line of the log that looks like ours."""
    Console("lines").write(Report("warning", 0, "bad\n  0:01 step 2/2  reward +9"))
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("summary", [POLICY, GENERATION, CHAIN], ids=["policy", "generate", "chain"])
def test_21_the_summary(summary: dict[str, object], tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    show_summary(tmp_path)
    output = capsys.readouterr().out
    assert_harmless(output)
    assert r"\x1b]0;pwned\x07" in output and "[/nope] :smile:" in " ".join(output.split())
    assert len(output) < 30_000


def test_21_the_summary_on_a_terminal_that_has_ascii_alone(tmp_path: Path) -> None:
    """Before: UnicodeEncodeError, after hours of training."""
    (tmp_path / "summary.json").write_text(
        json.dumps(POLICY | {"samples": [POLICY["samples"][0] | {"after": "é ☀"}]})
    )
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    show_summary(tmp_path, SafeConsole(file=stream, width=100))
    stream.seek(0)
    output = stream.read()
    assert r"\xe9 \u2600" in output and "Held-out reward" in output


def test_the_proof_is_one() -> None:
    """rich alone passes the codes on."""
    stream = io.StringIO()
    PlainConsole(file=stream, width=400).print(HOSTILE.replace("[/", "[ /"))
    with pytest.raises(AssertionError):
        assert_harmless(stream.getvalue())


@pytest.mark.parametrize(("error", "code"), [(DataError, 2), (RunFailed, 1)])
def test_21_the_error_of_a_row_and_the_log_that_one_would_cat(
    error: type[Exception], code: int, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "pin", lambda config, _: config)  # its model is nowhere
    config = make_config(run={"dir": str(tmp_path), "name": "r"})
    (tmp_path / "r").mkdir()

    with DriverRun(config) as run:
        run.pinned(config)
        raise error(f"rows.jsonl:1: prompt is {HOSTILE}")
    assert run.exit_code == code
    output = capsys.readouterr()
    assert r"\x1b]0;pwned\x07" in output.err
    assert_harmless(output.err + output.out)
    for log in (tmp_path / "r").iterdir():
        assert log.name == "error.log"
        assert_harmless(log.read_text())
        assert r"\x1b[2J" in log.read_text()


def test_21_problems_of_a_config(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "job\x1b[2J.yaml"
    path.write_text('model: {path: "\\e[2J", "\\e]0;x\\a": 1}\n')
    with pytest.raises(SystemExit):
        load_or_exit(PolicyRunConfig, [str(path)])
    output = capsys.readouterr().err
    assert "problem" in output
    assert_harmless(output)
    with pytest.raises(ConfigError):
        raise ConfigError([])
