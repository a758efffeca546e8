"""The commands around the jobs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.commands.cli import COMMANDS, main

HEAVY = {"torch", "ray", "numpy", "transformers", "pydantic"}


def test_every_command_names_a_function() -> None:
    for command in COMMANDS.values():
        module, _, function = command.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "data preview CONFIG.yaml" in capsys.readouterr().out
    assert main([]) == 2
    capsys.readouterr()
    assert main(["data", "preview", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: rayrlhf data preview CONFIG.yaml")


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preveiw", "a.yaml"]) == 2
    assert "no command 'data preveiw'; did you mean rayrlhf data preview?" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    script = (
        f"import sys; from rayrlhf.commands import cli; cli.main(['-h']); print({HEAVY!r} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "set()"
