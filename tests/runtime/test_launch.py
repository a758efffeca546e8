"""How a job's driver is started, on a cluster's Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.runtime.launch import launch


def driver(config: Any, started: Any) -> int:
    assert started is None
    if config == "interrupt":
        raise KeyboardInterrupt
    return config


@pytest.mark.parametrize(("config", "code"), [(0, 0), (2, 2), ("interrupt", 130)])
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Any, code: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert launch(f"{__name__}:driver", config) == code
    assert ("interrupted" in capsys.readouterr().err) == (config == "interrupt")
