"""Memory, peak FLOPS and bandwidth of GPU types. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayrlhf.config.base import ConfigError, Problem

GIB = 2**30
# Usable memory of a GPU: this share, less the CUDA context. The rest is lost to fragmentation.
USABLE_SHARE = 0.95
CONTEXT_BYTES = GIB


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    tflops: float  # dense bfloat16, from the vendor's data sheet
    bandwidth_tb: float  # TB/s

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE_SHARE) - CONTEXT_BYTES


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 40 * GIB, 312, 1.55),
        Gpu("A100-80", 80 * GIB, 312, 2.04),
        Gpu("H100-80", 80 * GIB, 989, 3.35),
        Gpu("H200-141", 141 * GIB, 989, 4.8),
        Gpu("B200-180", 180 * GIB, 2250, 8.0),
        Gpu("L4-24", 24 * GIB, 121, 0.3),
        Gpu("L40S-48", 48 * GIB, 362, 0.86),
        Gpu("A10-24", 24 * GIB, 125, 0.6),
        Gpu("RTX3090-24", 24 * GIB, 71, 0.94),
        Gpu("RTX4090-24", 24 * GIB, 165, 1.01),
        Gpu("RTX5090-32", 32 * GIB, 209, 1.79),
    )
}
SHORT = {
    "A100": "A100-80",
    "H100": "H100-80",
    "H200": "H200-141",
    "B200": "B200-180",
    "RTX4090": "RTX4090-24",
}
WANTED = "COUNTxNAME such as 16xA100-80 (known: " + ", ".join(GPUS) + "), or COUNTx24GB"


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """`16xA100-80` or `4x24GB`. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+)x(.+)", text.strip())
    if match is not None and int(match[1]) > 0:
        count, name = int(match[1]), match[2]
        size = re.fullmatch(r"(\d+)\s*Gi?B", name)
        if size is not None:
            return count, Gpu(f"{size[1]} GiB GPU", int(size[1]) * GIB, 165, 1.0)
        found = GPUS.get(SHORT.get(name, name))
        if found is not None:
            return count, found
    raise ConfigError([Problem("--gpus", got=text, wanted=WANTED, fix="write it like that")])
