"""Files and folders are checked before heavy imports, and again when a driver is called directly."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import SftRunConfig
from rayrlhf.runtime import file_checks as early
from rayrlhf.runtime.file_checks import check_files
from tests.checkpoint_files import write_checkpoint

Usage = namedtuple("Usage", "total used free")


def config(folder: Path, **run: Any) -> PolicyRunConfig:
    model = write_checkpoint(folder / "model")
    tree = {
        "run": {"name": "x", "dir": str(folder / "runs"), **run},
        "model": {"path": str(model)},
        "data": {"train": "p.jsonl"},
        "reward": {"sources": [{"type": "function", "function": "a:b"}]},
        "train": {"num_steps": 1},
    }
    return PolicyRunConfig.model_validate(tree)


def only_problem(config: Any) -> Problem:
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    (problem,) = caught.value.problems
    return problem


def test_a_good_run_leaves_no_trace(tmp_path: Path) -> None:
    check_files(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-only, another user's, full: a file is made, not a permission guessed."""

    def refuse(**_: Any) -> None:
        raise OSError(code, "no such luck")

    monkeypatch.setattr(early.tempfile, "TemporaryFile", refuse)
    problem = only_problem(config(tmp_path))
    assert problem.path == "run.dir" and "no such luck" in problem.got


def test_a_disk_without_room_for_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path)
    monkeypatch.setattr(early, "MIN_FREE_BYTES", 1000)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(early.shutil, "disk_usage", lambda _: Usage(0, 0, 1000 + size))
    check_files(run)
    monkeypatch.setattr(early.shutil, "disk_usage", lambda _: Usage(0, 0, 999 + size))
    assert "GiB free" in only_problem(run).got
    without = run.checkpoint.model_copy(update={"export": False})
    check_files(run.model_copy(update={"checkpoint": without}))


def test_the_largest_seed(tmp_path: Path) -> None:
    assert config(tmp_path, seed=2**31 - 1).run.seed == 2147483647
    with pytest.raises(ValueError):
        config(tmp_path, seed=2**31)


def test_every_checkpoint_of_a_job_is_looked_at(tmp_path: Path) -> None:
    run = config(tmp_path)
    keys = [key for key, _, _ in early.model_folders(run)]
    assert keys == ["model.path"]  # critic and ref start from it
    tree = run.model_dump(mode="json")
    tree["critic"]["path"] = tree["ref"]["path"] = tree["model"]["path"]
    tree["reward"]["sources"].append({"type": "model", "path": "x/y"})
    found = list(early.model_folders(PolicyRunConfig.model_validate(tree)))
    assert [(key, kind) for key, _, kind in found] == [
        ("model.path", "policy"),
        ("critic.path", "start"),
        ("ref.path", "policy"),
        ("reward.sources.1.path", "scorer"),
    ]


def test_a_driver_checks_what_a_script_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rayrlhf.supervised.driver import run_supervised

    (tmp_path / "file").touch()
    tree = {
        "run": {"name": "x", "dir": str(tmp_path / "file")},
        "model": {"path": str(write_checkpoint(tmp_path / "model"))},
        "data": {"train": "p.jsonl"},
    }
    assert run_supervised(SftRunConfig.model_validate(tree)) == 2
    assert "is a file" in capsys.readouterr().err


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' * 3)
    run = config(tmp_path).model_dump(mode="json") | {"data": {"train": str(tmp_path / "p.jsonl")}}
    (tmp_path / "config.yaml").write_text(json.dumps(run))
    code = (
        "import sys; from rayrlhf.runtime.file_checks import load_job; "
        "from rayrlhf.config.policy import PolicyRunConfig; "
        f"load_job(PolicyRunConfig, [{str(tmp_path / 'config.yaml')!r}]); "
        "print({'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
