"""Ray's own messages are in the run's folder, and not on the terminal."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from ray._private import worker

from rayrlhf.runtime.ray_messages import ray_messages_in

DATA = {"lines": ["A worker died or was killed"], "pid": "raylet", "is_err": False}


def test_messages_go_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "ray.log"
    with ray_messages_in(log):
        worker.print_to_stdstream(DATA, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    assert log.read_text().endswith(" raylet: A worker died or was killed\n")
    worker.print_to_stdstream({**DATA, "lines": ["afterwards"]}, ignore_prefix=False)
    assert "afterwards" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    with ray_messages_in(tmp_path / "missing" / "ray.log"):
        worker.print_to_stdstream(DATA, ignore_prefix=False)


def test_rays_listener_still_looks_the_function_up_by_its_name() -> None:
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)
