"""`make install` on a tiny lock whose packages lie in a folder: with the real pip, and uv where it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requirements.wheels import make_wheel

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = Path(sys._base_executable)  # pyright: ignore[reportAttributeAccessIssue]  # not the test's environment
UV = next(
    (
        path
        for path in (shutil.which("uv"), Path(sys.executable).with_name("uv"))
        if path and Path(path).exists()
    ),
    None,
)
LOCK = "deepspeed==0.19.8\nray==2.60.0\ntorch==2.13.0\nuv==0.13.9\n"
DEADLINE_SECONDS = 300
BACKEND = """\
import sys
sys.path.insert(0, "{tests}")
from wheels import make_wheel
def build_editable(folder, *_):
    return make_wheel(folder, "rayrlhf", "0.1", {{"rayrlhf_is_here.py": ""}}).name
"""
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "rayrlhf"
version = "0.1"
"""
NEEDS_ITS_LIBRARY = "import nvidia_x  # as libcudnn is found, or is not\n"


class Clone:
    """A clone with a tiny lock, and a folder of wheels in place of an index."""

    def __init__(self, folder: Path, *, cpu_build: bool) -> None:
        self.root, self.wheels = folder / "clone", folder / "wheels"
        self.wheels.mkdir()
        (folder / "home").mkdir()
        shutil.copytree(REPOSITORY / "requirements", self.root / "requirements")
        (self.root / "requirements" / "cpu.lock").write_text(LOCK)
        (self.root / "requirements" / "gpu.lock").write_text("nvidia_x==1\n")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND.format(tests=Path(__file__).parent))
        make_wheel(self.wheels, "ray", "2.60.0", {"ray.py": ""})
        make_wheel(self.wheels, "deepspeed", "0.19.8", {"deepspeed.py": ""})
        make_wheel(self.wheels, "torch", "2.13.0", {"torch.py": NEEDS_ITS_LIBRARY}, "nvidia_x")
        make_wheel(self.wheels, "nvidia_x", "1", {"nvidia_x.py": ""})
        make_wheel(self.wheels, "nvidia_x", "2", {"nvidia_x.py": ""})  # newer than what gpu.lock wants
        if cpu_build:
            make_wheel(self.wheels, "torch", "2.13.0+cpu", {"torch.py": ""})
        self.env = {
            "HOME": str(folder / "home"),
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(BASE),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
        }

    def with_uv(self) -> Clone:
        if UV is None:
            pytest.skip("uv is in the lock, but not in this environment yet: make install")
        folder = self.root.parent / "bin"
        folder.mkdir()
        (folder / "uv").symlink_to(UV)
        self.env["PATH"] = f"{folder}:{self.env['PATH']}"
        return self

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["requirements/install.sh", ".venv"],
            cwd=self.root,
            env=self.env | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )

    def installed(self) -> set[str]:
        found = self.root.glob(".venv/lib/python*/site-packages/*.dist-info")
        return {path.name.removesuffix(".dist-info") for path in found}


def test_uv_takes_the_cpu_build_and_a_broken_environment_is_made_again(tmp_path: Path) -> None:
    clone = Clone(tmp_path, cpu_build=True).with_uv()
    done = clone.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Installing 4 locked packages into .venv (Python 3." in done.stdout
    assert f"  torch 2.13.0+cpu: its CPU build, from file://{clone.wheels}" in done.stdout
    assert "  uv installs: 1 to 3 minutes, 1 GB to download" in done.stdout and "Installed in " in done.stdout
    whole = {"torch-2.13.0+cpu", "ray-2.60.0", "deepspeed-0.19.8", "rayrlhf-0.1"}
    assert clone.installed() >= whole and not any(name.startswith("nvidia") for name in clone.installed())

    again = clone.install(PYTHON="")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", ""), "nothing to do"

    # As a kill in the middle leaves it: no stamp, the mark, and a package that is half there.
    (clone.root / ".venv/installed").unlink()
    (clone.root / ".venv/incomplete").touch()
    next(clone.root.glob(".venv/lib/python*/site-packages/torch.py")).unlink()
    repaired = clone.install()
    assert repaired.returncode == 0 and clone.installed() >= whole, repaired.stdout + repaired.stderr
    assert next(clone.root.glob(".venv/lib/python*/site-packages/torch.py"))
    assert not (clone.root / ".venv/incomplete").exists()

    # A lock that has changed brings it up to date, and leaves what the user has put there.
    (site,) = clone.root.glob(".venv/lib/python*/site-packages")
    (site / "mine.py").touch()
    make_wheel(clone.wheels, "ray", "2.60.1", {"ray.py": ""})
    lock = clone.root / "requirements/cpu.lock"
    lock.write_text(LOCK.replace("2.60.0", "2.60.1"))
    updated = clone.install()
    assert updated.returncode == 0 and "torch 2.13.0+cpu: it is there already" in updated.stdout, (
        updated.stderr
    )
    assert "ray-2.60.1" in clone.installed() and (site / "mine.py").exists()

    # Copied elsewhere, its scripts would name the old interpreter.
    moved = clone.root.rename(tmp_path / "moved")
    clone.root = moved
    assert clone.install().returncode == 0
    assert str(moved) in (moved / ".venv/bin/ray").read_text()


def test_uv_brings_cudas_libraries_where_there_is_no_cpu_build(tmp_path: Path) -> None:
    clone = Clone(tmp_path, cpu_build=False).with_uv()
    done = clone.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  torch 2.13.0: its CUDA build with its libraries, which runs on CPUs too" in done.stdout
    assert {"torch-2.13.0", "nvidia_x-1"} <= clone.installed(), "the version that gpu.lock has"


def test_what_fails_is_named_with_what_to_do_and_the_next_run_goes_on(tmp_path: Path) -> None:
    clone = Clone(tmp_path, cpu_build=True).with_uv()
    (clone.wheels / "ray-2.60.0-py3-none-any.whl").rename(tmp_path / "ray.whl")
    done = clone.install()
    assert done.returncode == 1 and "ray==2.60.0" in done.stderr
    assert "the whole log is .venv/install.log" in done.stderr and "make install INSTALLER=pip" in done.stderr
    assert not (clone.root / ".venv/installed").exists()
    (tmp_path / "ray.whl").rename(clone.wheels / "ray-2.60.0-py3-none-any.whl")
    done = clone.install()
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_uvs_wheel_pip_installs(tmp_path: Path) -> None:
    clone = Clone(tmp_path, cpu_build=False)
    done = clone.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  pip installs: uv 0.13.9, which takes a quarter of the time, is not in the" in done.stdout
    assert "  torch 2.13.0: its CUDA build with its libraries" in done.stdout
    assert "  pip installs: 6 to 15 minutes, 4 GB to download" in done.stdout
    assert {"torch-2.13.0", "nvidia_x-1", "ray-2.60.0", "rayrlhf-0.1"} <= clone.installed()


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    clone = Clone(tmp_path, cpu_build=True)
    for environment, words in (
        ({"PYTHON": "/nowhere/python3.11"}, "PYTHON=/nowhere/python3.11 was not found."),
        ({"PYTHON": "/bin/true"}, "the locked packages are for 3.11, 3.12 and 3.13."),
        ({"LOCK": "tpu"}, "LOCK=tpu, wanted cpu or gpu."),
    ):
        done = clone.install(**environment)
        assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not (clone.root / ".venv").exists()


def test_without_a_python_that_fits_uv_is_asked_for_one(tmp_path: Path) -> None:
    """The user's uv knows one; python3 is too old, and a version manager's shims do not start."""
    clone = Clone(tmp_path, cpu_build=True).with_uv()
    folder = tmp_path / "shims"
    folder.mkdir()
    for name, body in {
        "python3": "exit 3",
        "python3.11": "exit 127",
        "python3.12": "exit 127",
        "python3.13": "exit 127",
        "uv": f'[ "$1 $2" = "python find" ] && echo {BASE} || exec {UV} "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    done = clone.install(PYTHON="", PATH=f"{folder}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("installer", ["uv", pytest.param("pip", marks=pytest.mark.long)])
def test_an_index_that_does_not_answer_ends_it_in_words_and_without_its_password(
    installer: str, tmp_path: Path
) -> None:
    clone = Clone(tmp_path, cpu_build=True)
    if installer == "uv":
        clone.with_uv()
    index = "http://user:s3cret@127.0.0.1:9/simple"  # the port of "discard": nobody listens
    done = clone.install(PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL=index, NO_PROXY="*")
    assert done.returncode == 1 and "install: the package index does not answer:" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    log = (clone.root / ".venv/install.log").read_text()
    assert "s3cret" not in done.stdout + done.stderr + log
