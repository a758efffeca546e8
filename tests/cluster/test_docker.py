"""The images' Dockerfiles: sound, and of files that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = sorted((REPOSITORY / "cluster" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_copies_exists_and_is_not_ignored(file: Path) -> None:
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", file.read_text(), re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    ignored = {line.strip("/") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()}
    assert copied and all((REPOSITORY / name).exists() and name not in ignored for name in copied)


def test_there_is_an_image_with_each_lock() -> None:
    found = {file.name: re.findall(r"LOCK=(\w+)", file.read_text()) for file in DOCKERFILES}
    assert found == {"cpu.Dockerfile": ["cpu"], "cuda.Dockerfile": ["gpu"]}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_linter_finds_nothing(file: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("docker") is None, reason="no Docker on this machine")
def test_the_cpu_image_is_built_and_starts() -> None:
    build = ["docker", "build", "--quiet", "--file", "cluster/docker/cpu.Dockerfile", "."]
    built = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True, timeout=3000)
    assert built.returncode == 0, built.stderr
    run = ["docker", "run", "--rm", built.stdout.strip(), "rayrlhf", "--help"]
    ran = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "usage" in ran.stdout, ran.stderr
