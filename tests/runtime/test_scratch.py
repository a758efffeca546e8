"""What a killed run leaves in scratch/ goes at the next start, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayrlhf.runtime.preflight import InputError
from rayrlhf.runtime.scratch import locked_scratch, scratch_of
from rayrlhf.train.checkpoint import clear

HOLD = """
import sys, time
from pathlib import Path
from rayrlhf.runtime.scratch import locked_scratch, scratch_of
run = Path(sys.argv[1])
with locked_scratch(run, "other"):
    (scratch_of(run, "other") / "step_000002").mkdir(parents=True)
    print("held", flush=True)
    time.sleep(600)
"""


def test_31_a_whole_checkpoint_per_crash_is_cleared_at_start(tmp_path: Path) -> None:
    """Of a process killed with SIGKILL, which lets go of its lock and of nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "scratch" / "step-000004-rank-0-abc").mkdir(parents=True)  # of a version without locks
    living = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert living.stdout is not None and living.stdout.readline() == "held\n"
        with locked_scratch(run, "mine"):
            mine = scratch_of(run, "mine")
            mine.mkdir()
            assert (scratch_of(run, "other") / "step_000002").is_dir(), "its run lives"
            assert not (run / "scratch" / "step-000004-rank-0-abc").exists()
        assert not mine.exists()
    finally:
        living.kill()
        living.wait()
    deadline = time.monotonic() + 60
    while (run / "scratch").exists() and time.monotonic() < deadline:
        with locked_scratch(run, "mine"):
            pass
    assert list(run.iterdir()) == [], "and nothing is left behind"


def test_31_links_are_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("of another user")
    (run / "scratch").mkdir(parents=True)
    (run / "scratch" / "link").symlink_to(elsewhere)
    (run / "scratch" / "folder").mkdir()
    (run / "scratch" / "folder" / "inner").symlink_to(elsewhere)
    with locked_scratch(run, "mine"):
        assert {path.name for path in (run / "scratch").iterdir()} == {"mine.lock"}
    assert (elsewhere / "precious").is_file()
    clear(tmp_path / "none")
    (tmp_path / "link").symlink_to(elsewhere)
    clear(tmp_path / "link")
    assert (elsewhere / "precious").is_file()
    (run / "scratch").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"scratch is a link; wanted a folder"), locked_scratch(run, "mine"):
        pass
    assert (elsewhere / "precious").is_file()
