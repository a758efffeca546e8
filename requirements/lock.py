"""`make lock`: resolve pyproject.toml into requirements/cpu.lock and requirements/gpu.lock.

    python -m requirements.lock [cpu] [gpu] [--upgrade | --upgrade-package NAME ...]

Both are plain requirement files that pip and uv install with `--no-deps`. Versions stay as they are unless a
range excludes them or an upgrade is asked for. A package whose version depends on Python's has a line per
version, with a marker. Resolved from the default index alone: a build of torch that another index has would
bring other dependencies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from requirements import indexes

FOLDER = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"  # what torch's wheels are made for
DEADLINE_SECONDS = 600
EXTRAS = ("wandb", "verify", "demo", "bench", "dev")
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)")


class Lock(NamedTuple):
    """One lock file: what it is for, and what it is resolved from besides pyproject.toml."""

    purpose: str
    extra: str  # of pyproject.toml, that names torch and vLLM
    arguments: tuple[str, ...]  # of uv


LOCKS = {
    "cpu": Lock(
        "machines without a GPU; `make` installs it. Left out on purpose: excludes.txt, cpu-excludes.txt",
        "cpu",
        ("--excludes=requirements/cpu-excludes.txt", "--overrides=requirements/cpu-overrides.txt"),
    ),
    "gpu": Lock(
        "machines with NVIDIA GPUs: `make install LOCK=gpu`",
        "gpu",
        ("--constraints=requirements/gpu-constraints.txt",),
    ),
}
HEAD = """\
# Made by `make lock` from pyproject.toml: change the ranges there, not this file.
# For {purpose}.
# Linux x86-64, Python {pythons}. Complete, so it is installed without the resolver (--no-deps).
"""


def pins(lock: Path) -> dict[str, str]:
    """Version by name, in a lock file's lines; for a package with several lines, the first."""
    found: dict[str, str] = {}
    for line in lock.read_text().splitlines() if lock.exists() else []:
        if match := PIN.match(line):
            found.setdefault(match["name"], match["version"])
    return found


def lines(resolved: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A lock's lines, from the version of each package by the version of Python.

    >>> lines({"3.11": {"a": "1", "b": "1"}, "3.12": {"a": "1", "b": "2"}})
    ['a==1', "b==1 ; python_version == '3.11'", "b==2 ; python_version == '3.12'"]
    """
    out: list[str] = []
    for name in sorted({name for versions in resolved.values() for name in versions}):
        pythons_of: dict[str, list[str]] = {}
        for python, versions in resolved.items():
            if name in versions:
                pythons_of.setdefault(versions[name], []).append(python)
        for version, pythons in pythons_of.items():
            everywhere = len(pythons) == len(resolved)
            marker = " or ".join(f"python_version == '{python}'" for python in pythons)
            out.append(f"{name}=={version}" + ("" if everywhere else f" ; {marker}"))
    return out


def resolve(
    uv: str, lock: Lock, preferred: Mapping[str, str], python: str, more: Iterable[str]
) -> dict[str, str]:
    """Version by name for one version of Python. Raises `RuntimeError` with uv's own words."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.txt"  # uv prefers the versions that it finds in its output file
        out.write_text("".join(f"{name}=={version}\n" for name, version in preferred.items()))
        command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--no-annotate", "--no-header"]
        command += [f"--extra={extra}" for extra in (lock.extra, *EXTRAS)] + ["--group=build"]
        command += [f"--python-platform={PLATFORM}", f"--python-version={python}", f"--output-file={out}"]
        command += ["--excludes=requirements/excludes.txt", *lock.arguments, *more]
        settings = indexes.read_pip_settings([sys.executable, "-m", "pip"])
        settings = indexes.Settings(
            default_index=settings.default_index, cert=settings.cert, proxy=settings.proxy
        )
        env = indexes.uv_environment(settings, os.environ)
        done = subprocess.run(
            command, env=env, cwd=FOLDER.parent, capture_output=True, text=True, timeout=DEADLINE_SECONDS
        )
        if done.returncode:
            raise RuntimeError(indexes.redact(done.stderr.strip()))
        return pins(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make lock")
    parser.add_argument("locks", nargs="*", metavar="cpu|gpu", help="which; without any, both")
    parser.add_argument(
        "--upgrade", action="store_true", help="every package to the newest that its range allows"
    )
    parser.add_argument("--upgrade-package", action="append", default=[], metavar="NAME")
    options = parser.parse_args(argv)
    if unknown := set(options.locks) - set(LOCKS):
        parser.error(f"got {', '.join(sorted(unknown))}, wanted cpu or gpu")
    more = ["--upgrade"] * options.upgrade + [f"--upgrade-package={name}" for name in options.upgrade_package]
    uv = str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        uv = shutil.which("uv") or parser.error("uv was not found; `make install` brings it")
    for name in LOCKS if not options.locks else dict.fromkeys(options.locks):
        lock, path = LOCKS[name], FOLDER / f"{name}.lock"
        preferred = pins(path) | pins(FOLDER / "cpu.lock")  # what both have has one version where it can
        resolved = {python: resolve(uv, lock, preferred, python, more) for python in PYTHONS}
        head = HEAD.format(purpose=lock.purpose, pythons=f"{PYTHONS[0]} to {PYTHONS[-1]}")
        body = lines(resolved)
        before = path.read_text().splitlines() if path.exists() else []
        changed = len(set(body) ^ {line for line in before if PIN.match(line)})
        path.write_text(head + "\n" + "\n".join(body) + "\n")
        print(f"{path.relative_to(FOLDER.parent)}: {len(body)} packages, {changed} lines changed")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, FileNotFoundError, subprocess.TimeoutExpired) as error:
        sys.exit(f"lock: {error}")
