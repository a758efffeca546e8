"""Environment variables, compilers and Ray's access token."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from rayrlhf.commands.doctor.finding import Finding, ok, warn


def check_environment() -> Iterator[Finding]:
    yield from judge_proxies(os.environ)
    yield judge_token(os.environ, Path.home())
    yield judge_hub(os.environ)
    yield judge_compiler(shutil.which("nvcc"), shutil.which("ninja"), os.environ.get("CUDA_HOME"))


def judge_proxies(env: Mapping[str, str]) -> Iterator[Finding]:
    proxy = next((key for key in ("http_proxy", "HTTP_PROXY") if env.get(key)), None)
    exceptions = env.get("no_proxy", "") + env.get("NO_PROXY", "")
    if proxy is not None and "127.0.0.1" not in exceptions and "localhost" not in exceptions:
        found = f"{proxy} is set and no_proxy does not name localhost"
        yield warn("proxy", found, "export no_proxy=localhost,127.0.0.1: Ray must bypass the proxy there")
    else:
        yield ok("proxy", f"{proxy} with exceptions for localhost" if proxy else "none")


def judge_token(env: Mapping[str, str], home: Path) -> Finding:
    """Ray 2.60 requires a token if one exists: in its variables, or in ~/.ray/auth_token."""
    if env.get("RAY_AUTH_TOKEN"):
        return ok("token", "in RAY_AUTH_TOKEN")
    path = Path(env.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if not path.is_file():
        if env.get("RAY_AUTH_TOKEN_PATH"):
            return warn("token", f"RAY_AUTH_TOKEN_PATH={path} does not exist", "correct it, or unset it")
        return ok("token", "none: anyone who reaches the cluster's ports can run code on it")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return warn("token", f"{path} can be read by others", f"chmod 600 {path}")
    return ok("token", f"in {path}")


def judge_hub(env: Mapping[str, str]) -> Finding:
    home = env.get("HF_HOME")
    if home and not Path(home).is_dir():
        return warn("model hub", f"HF_HOME={home} does not exist", "create it, or unset HF_HOME")
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ok("model hub", "HF_HUB_OFFLINE is set: ids of the hub are looked up in the local cache only")
    return ok("model hub", "ids of the hub may be fetched (HF_HUB_OFFLINE=1 forbids it)")


def judge_compiler(nvcc: str | None, ninja: str | None, cuda_home: str | None) -> Finding:
    """DeepSpeed compiles its Adam for offloaded optimizers on a GPU machine."""
    if nvcc is None and cuda_home is None:
        return ok("compiler", "no CUDA compiler: train.offload_optimizer needs one on GPUs")
    if ninja is None:
        return warn("compiler", "nvcc without ninja", "pip install ninja: DeepSpeed compiles with it")
    return ok("compiler", f"{nvcc or cuda_home} and {ninja}")
