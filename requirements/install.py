"""Brings a virtual environment to a lock plus rayrlhf itself (editable); install.sh runs it for `make`.

    python -m requirements.install VENV LOCK KEY      in the root of the repository

It runs on the interpreter that the environment is made with, before anything is installed: standard library
only. `KEY` says what is installed: it is written when all is done, so what was interrupted is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from requirements.indexes import (
    Settings,
    pip_environment,
    read_pip_settings,
    redact,
    uv_arguments,
    uv_environment,
)
from requirements.progress import Progress
from requirements.torch_build import Build, Failure, choose_with_pip, choose_with_uv, no_answer

PYTHONS = ((3, 11), (3, 13))
OLDEST_UV = (0, 8)  # --torch-backend, --no-build-isolation-package
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
SHORT_SECONDS = 300  # on a machine that is busy otherwise
OTHER_SECONDS = 3600  # for another installation into the same folder
# Built without isolation: DeepSpeed imports torch when it is built.
BUILT_HERE = "deepspeed"
# A job imports none of these, or a single one: each model of transformers is a file of its own.
NOT_COMPILED = r"/tests?/|/transformers/models/(?!auto/|llama/)|/ray/rllib/|/torch/testing/|/pip/"
NEEDED_GB = {"cpu": 6, "cuda": 12}  # with the cache


class Installer(NamedTuple):
    """uv or pip, and the environment that it works in."""

    command: tuple[str, ...]  # up to and including "install"
    env: dict[str, str]
    name: str


def main(argv: Sequence[str]) -> int:
    venv, lock, key = Path(argv[0]).absolute(), Path(argv[1]), argv[2]
    try:
        with _alone(lock):
            if not _done(venv, key, os.environ):
                install(venv, lock, key)
    except Failure as failure:
        for line in failure.args:
            print(f"install: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall: interrupted; make goes on from what was downloaded", file=sys.stderr)
        return 130
    return 0


def install(venv: Path, lock: Path, key: str) -> None:
    """From whatever is there, nothing or a broken half included. Raises `Failure`."""
    _check_machine()
    started = time.monotonic()
    env = dict(os.environ)
    requirements = pinned(lock)
    if not usable(venv, env):
        make_venv(venv, env, with_pip=_own_uv(env) is None)
    (venv / "incomplete").touch()
    (venv / "installed").unlink(missing_ok=True)
    progress = Progress(venv / "install.log")
    progress.log.write_text("")
    python = venv / "bin" / "python"
    version = platform.python_version()
    progress.say(
        f"Installing {len(requirements)} locked packages into {venv.name} (Python {version}, once) ..."
    )

    pip = _pip_of(python, env)
    settings = read_pip_settings(pip or _pip_of(Path(sys.executable), env), env)
    uv = find_uv(venv, pip, requirements["uv"], env, progress)
    if uv is not None:
        build, settings = torch_build_with_uv(uv, python, lock, requirements, settings, env)
        uv_env = uv_environment(settings, env)
        installer = Installer(
            (uv, "pip", "install", f"--python={python}", *uv_arguments(settings)), uv_env, "uv"
        )
    elif pip is not None:
        build = torch_build_with_pip(pip, lock, requirements, env)
        installer = Installer((*pip, "install"), pip_environment(env), "pip")
    else:
        raise Failure(
            "there is neither pip nor uv.",
            "Fix: install one (on Debian and Ubuntu: python3-venv, which brings pip), and run make again.",
        )
    _announce(progress, installer, build, lock)
    install_lock(installer, build, requirements, lock, progress)
    check_imports(python, env, progress)
    compile_bytecode(python, env, progress)
    (venv / "lock").write_text(f"{lock.stem}\n")
    (venv / "incomplete").unlink()
    (venv / "installed").write_text(f"{key}\n")
    seconds = time.monotonic() - started
    progress.say(f"Installed in {seconds:.0f} seconds (log: {os.path.relpath(progress.log)})")


def pinned(lock: Path) -> dict[str, str]:
    """Version by name, of the lines that hold for this interpreter.

    The markers are `make lock`'s own: versions of Python, joined by "or" (requirements/lock.py).
    """
    found: dict[str, str] = {}
    for line in lock.read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if "==" in requirement and not line.startswith("#") and (not marker or f"'{HERE}'" in marker):
            name, _, version = requirement.strip().partition("==")
            found[name] = version
    return found


def usable(venv: Path, env: Mapping[str, str]) -> bool:
    """Whether it can be brought up to date: whole, made for this folder, and of the wanted Python."""
    python = venv / "bin" / "python"
    if (
        venv.is_symlink()
        or (venv / "incomplete").exists()
        or not (venv / "lock").exists()
        or not python.exists()
    ):
        return False
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run(
        [python, "-c", code], env=dict(env), capture_output=True, text=True, timeout=SHORT_SECONDS
    )
    if done.returncode or done.stdout.strip() != HERE:
        return False
    script = venv / "bin" / "ray"  # names its interpreter: wrong in a copy, or after a move
    return script.exists() and str(python).encode() in script.read_bytes()


def make_venv(venv: Path, env: Mapping[str, str], *, with_pip: bool) -> None:
    """Empty but for pip, where this interpreter has it. Raises `Failure`."""
    if venv.is_symlink():
        venv.unlink()
    shutil.rmtree(venv, ignore_errors=True)
    with_pip &= importlib.util.find_spec("ensurepip") is not None  # Debian has it in a package of its own
    command = [sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(venv)]
    done = subprocess.run(
        command, env=pip_environment(env), capture_output=True, text=True, timeout=SHORT_SECONDS
    )
    if done.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise Failure(
            f"'{' '.join(command)}' failed: {redact((done.stdout + done.stderr).strip())[-500:]}",
            "Fix: install Python's venv (on Debian and Ubuntu: python3-venv), or name another interpreter: "
            "make install PYTHON=/path/to/python3",
        )
    (venv / "incomplete").touch()


def find_uv(
    venv: Path, pip: Sequence[str] | None, wanted: str, env: Mapping[str, str], progress: Progress
) -> str | None:
    """The user's own uv if it is recent enough, else the lock's, which the configured index has as a wheel.

    None where there is no such wheel. Raises `Failure` where the index does not answer.
    """
    if env.get("INSTALLER") == "pip":
        progress.say("  pip installs, as INSTALLER=pip asks")
        return None
    if own := _own_uv(env):
        return own
    if _uv_version(str(venv / "bin" / "uv"), env) >= OLDEST_UV:
        return str(venv / "bin" / "uv")
    if pip is None:
        return None
    command = [
        *pip,
        "install",
        "--no-deps",
        "--only-binary=:all:",
        "--timeout=10",
        "--retries=1",
        f"uv=={wanted}",
    ]
    if progress.run(command, pip_environment(env)) == 0 and _uv_version(str(venv / "bin" / "uv"), env):
        return str(venv / "bin" / "uv")
    said = progress.tail(30)
    if any(words in said for words in ("connection broken", "Could not fetch URL", "Max retries")):
        raise no_answer(
            next(line for line in said.splitlines() if "connection broken" in line or "Max retries" in line)
        )
    progress.say(
        f"  pip installs: uv {wanted}, which takes a quarter of the time, is not in the configured index"
    )
    return None


def torch_build_with_uv(
    uv: str,
    python: Path,
    lock: Path,
    requirements: Mapping[str, str],
    settings: Settings,
    env: Mapping[str, str],
) -> tuple[Build, Settings]:
    if build := _settled(python, lock, requirements):
        return build, settings
    chosen, answering = choose_with_uv(uv, python, requirements["torch"], settings, env)
    for place in sorted(set(settings.locations) - set(answering.locations)):
        print(f"  left out, as it does not answer: {redact(place)}", flush=True)
    return chosen, answering


def torch_build_with_pip(
    pip: Sequence[str], lock: Path, requirements: Mapping[str, str], env: Mapping[str, str]
) -> Build:
    return _settled(Path(pip[0]), lock, requirements) or choose_with_pip(pip, requirements["torch"], env)


def _settled(python: Path, lock: Path, requirements: Mapping[str, str]) -> Build | None:
    """Where there is nothing to choose: on a machine with GPUs, and where the build is installed."""
    version = requirements["torch"]
    if lock.stem != "cpu":
        return Build(f"torch=={version}", "the CUDA build that vLLM is made for")
    for found in python.parent.parent.glob(f"lib/python*/site-packages/torch-{version}*.dist-info"):
        installed = found.name.removeprefix("torch-").removesuffix(".dist-info")
        return Build(f"torch=={installed}", "it is there already", (), "+cpu" not in installed)
    return None


def install_lock(
    installer: Installer, build: Build, requirements: Mapping[str, str], lock: Path, progress: Progress
) -> None:
    """All but DeepSpeed; CUDA's libraries where torch needs them; DeepSpeed and rayrlhf. Raises `Failure`.

    --no-deps: the lock is complete, and the resolver would add what breaks a CPU torch (cpu-excludes.txt).
    DS_BUILD_OPS=0: DeepSpeed without its CUDA ops, so that no nvcc is needed to build it.
    """
    names = [name for name in requirements if name not in ("torch", "uv", BUILT_HERE)]  # find_uv brings uv
    rest = progress.log.with_name("requirements.txt")
    rest.write_text("".join(f"{name}=={requirements[name]}\n" for name in names))
    here = [f"{BUILT_HERE}=={requirements[BUILT_HERE]}", "--editable=."]
    steps = [["--no-deps", build.requirement, f"--requirement={rest}", *build.arguments]]
    if build.libraries:
        steps.append([build.requirement, f"--constraint={lock.with_name('gpu.lock')}"])
    steps.append(["--no-deps", "--no-build-isolation", *here])
    for step in steps:
        status = progress.run([*installer.command, *step], installer.env | {"DS_BUILD_OPS": "0"})
        if status:
            raise Failure(*_explained(installer, status, progress))


def check_imports(python: Path, env: Mapping[str, str], progress: Progress) -> None:
    """Raises `Failure` where torch does not import."""
    if progress.run([str(python), "-c", "import torch"], pip_environment(env)):
        raise Failure(
            f"torch was installed but does not import:\n{progress.tail(5)}",
            f"Fix: remove {python.parent.parent} and run make again; if that does not help, the lines above "
            "say what this machine lacks.",
        )


def compile_bytecode(python: Path, env: Mapping[str, str], progress: Progress) -> None:
    """Compile the packages to bytecode, on all cores, as uv does not.

    A job has twenty processes, and each would compile what it imports: on two cores the first job takes more
    than twice as long to start, and so does every job under PYTHONDONTWRITEBYTECODE, which many images set.
    """
    progress.say("  compiling to bytecode, so that jobs start faster")
    site_packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    # A few files of packages are not valid for this Python, for which the status is 1.
    progress.run(
        [str(python), "-m", "compileall", "-qq", "-j0", "-x", NOT_COMPILED, str(site_packages)],
        pip_environment(env),
    )


def _explained(installer: Installer, status: int, progress: Progress) -> list[str]:
    log = os.path.relpath(progress.log)
    if "No space left" in progress.tail(50):
        fix = "Fix: make room on this disk and on that of the cache (UV_CACHE_DIR and PIP_CACHE_DIR move it)."
    elif installer.name == "uv":
        fix = "Fix what the lines above name and run make again; or let pip try: make install INSTALLER=pip"
    else:
        fix = "Fix what the lines above name and run make again."
    why = "did nothing for a quarter of an hour" if status == 124 else f"failed with exit status {status}"
    return [f"{installer.name} {why}; the whole log is {log}; its end:\n{progress.tail()}", fix]


def _announce(progress: Progress, installer: Installer, build: Build, lock: Path) -> None:
    cuda = build.libraries or lock.stem != "cpu"
    need = NEEDED_GB["cuda" if cuda else "cpu"]
    free = shutil.disk_usage(progress.log.parent).free / 1e9
    if free < need:
        raise Failure(
            f"{free:.0f} GB are free on the disk of {progress.log.parent}, and {need} are needed.",
            "Fix: make room.",
        )
    progress.say(f"  torch {build.requirement.partition('==')[2]}: {build.why}")
    progress.say(f"  {installer.name} installs: {EXPECTED[installer.name, cuda]}")


# Measured on two cores, idle and with much else to do, where the network was not what took the time.
EXPECTED = {
    ("uv", False): "1 to 3 minutes, 1 GB to download",
    ("uv", True): "2 to 4 minutes, 4 GB to download",
    ("pip", False): "4 to 12 minutes, 1 GB to download",
    ("pip", True): "6 to 15 minutes, 4 GB to download",
}


def _check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Failure(
            f"this is {platform.system()} on {platform.machine()}, the lock is for Linux on x86_64.",
            "Fix: use such a machine, or install packages of your choice and `pip install --no-deps -e .`",
        )
    here = sys.version_info[:2]
    if not PYTHONS[0] <= here <= PYTHONS[1]:
        raise Failure(
            f"{sys.executable} is Python {platform.python_version()}, the lock is for 3.11 to 3.13.",
            "Fix: name another interpreter: make install PYTHON=/path/to/python3.11",
        )


def _done(venv: Path, key: str, env: Mapping[str, str]) -> bool:
    stamp = venv / "installed"
    if not stamp.is_file() or stamp.read_text().strip() != key:
        return False
    return not env.get("PYTHON") or usable(venv, env)  # another interpreter may be asked for


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Two `make` in one folder: the second waits. Raises `Failure` after an hour."""
    with lock.open() as file:
        deadline = time.monotonic() + OTHER_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    print("Another make is installing here; waiting for it ...", flush=True)
                waiting = True
                if time.monotonic() > deadline:
                    raise Failure(
                        "another make has been installing here for an hour.", "Fix: end it."
                    ) from None
                time.sleep(1)
            except OSError:  # a file system without locks: one is alone, or takes the consequences
                break
        yield


def _pip_of(python: Path, env: Mapping[str, str]) -> list[str] | None:
    command = [str(python), "-m", "pip"]
    done = subprocess.run(
        [*command, "--version"], env=pip_environment(env), capture_output=True, timeout=SHORT_SECONDS
    )
    return command if done.returncode == 0 else None


def _own_uv(env: Mapping[str, str]) -> str | None:
    """The user's, or the one that install.sh asked for Python; where it is wanted and recent enough."""
    if env.get("INSTALLER") == "pip":
        return None
    candidates = (shutil.which("uv", path=env.get("PATH")), str(Path(".uv/bin/uv").absolute()))
    return next((path for path in candidates if path and _uv_version(path, env) >= OLDEST_UV), None)


def _uv_version(uv: str, env: Mapping[str, str]) -> tuple[int, ...]:
    """(0, 13, 9); () for what is no uv, or does not start."""
    try:
        done = subprocess.run(
            [uv, "--version"], env=dict(env), capture_output=True, text=True, timeout=SHORT_SECONDS
        )
    except OSError:
        return ()
    match = re.match(r"uv (\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(int(part) for part in match.groups()) if match else ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
