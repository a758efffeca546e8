"""The peers' virtual environment, benchmarks/peers/.venv: TRL and what it needs, pinned in requirements.txt.

Its torch is the build of the version that rayrlhf's own lock names, chosen as requirements/install.py
chooses it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from requirements.indexes import pip_environment, read_pip_settings, uv_arguments, uv_environment
from requirements.install import check_imports, make_venv, pinned
from requirements.progress import Progress
from requirements.torch_build import Failure, choose_with_pip, choose_with_uv

FOLDER = Path(__file__).resolve().parent
VENV = FOLDER / ".venv"
REQUIREMENTS = FOLDER / "requirements.txt"


def ensure_peers() -> Path:
    """Its interpreter; installs what is missing. Raises `Failure`."""
    python = VENV / "bin" / "python"
    key = hashlib.sha256(f"{VENV}\n{REQUIREMENTS.read_text()}".encode()).hexdigest()
    stamp = VENV / "installed"
    if stamp.is_file() and stamp.read_text() == key:
        return python
    env = dict(os.environ)
    uv = _find_uv(env)
    make_venv(VENV, env, with_pip=uv is None)
    progress = Progress(VENV / "install.log")
    progress.log.touch()
    requirements = pinned(REQUIREMENTS)
    version = requirements.pop("torch")
    progress.say(f"Installing TRL {requirements['trl']} and its packages into {VENV.name} (once) ...")
    rest = VENV / "requirements.txt"
    rest.write_text("".join(f"{name}=={number}\n" for name, number in requirements.items()))
    if uv is not None:
        settings = read_pip_settings([sys.executable, "-m", "pip"], env)
        build, settings = choose_with_uv(uv, python, version, settings, env)
        command = [uv, "pip", "install", f"--python={python}", *uv_arguments(settings), *build.arguments]
        env = uv_environment(settings, env)
    else:
        build = choose_with_pip([str(python), "-m", "pip"], version, env)
        command, env = [str(python), "-m", "pip", "install"], pip_environment(env)
    progress.say(f"  torch {build.requirement.partition('==')[2]}: {build.why}")
    steps = [["--no-deps", build.requirement, f"--requirement={rest}"]]
    if build.libraries:
        steps.append([build.requirement])  # with CUDA's libraries, without which it does not import
    for step in steps:
        if status := progress.run([*command, *step], env):
            raise Failure(
                f"the peers' packages were not installed (exit status {status}):\n{progress.tail()}"
            )
    check_imports(python, env, progress)
    stamp.write_text(key)
    return python


def _find_uv(env: dict[str, str]) -> str | None:
    """uv of rayrlhf's own environment, or the user's; None with INSTALLER=pip."""
    if env.get("INSTALLER") == "pip":
        return None
    own = Path(sys.executable).with_name("uv")
    return str(own) if own.exists() else shutil.which("uv")


if __name__ == "__main__":
    try:
        print(ensure_peers())
    except Failure as failure:
        sys.exit("\n".join(map(str, failure.args)))
