"""GPUs as reported by nvidia-smi, and NCCL settings."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping

from rayrlhf.commands.doctor.finding import Finding, fail, ok, output_of, warn

SMI_SECONDS = 30.0
QUERY = (
    "index,name,memory.total,memory.used,compute_cap,driver_version,mig.mode.current,"
    "ecc.errors.uncorrected.volatile.total"
)
BUSY_MIB = 1024


def check_gpus() -> Iterator[Finding]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        text = output_of(command, timeout_seconds=SMI_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = (error.stdout or error.stderr or "").strip().splitlines()
        yield fail("GPUs", f"nvidia-smi fails: {lines[0] if lines else error}", "reinstall the NVIDIA driver")
        return
    except subprocess.TimeoutExpired:
        yield fail("GPUs", f"nvidia-smi did not answer within {SMI_SECONDS:g} s", "a GPU hangs: reboot")
        return
    if text is None:
        yield ok("GPUs", "no NVIDIA driver: everything runs on the CPU")
        return
    yield from judge_gpus(text)


def judge_gpus(text: str) -> Iterator[Finding]:
    """Findings from nvidia-smi's output for QUERY."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    if not rows:
        yield fail("GPUs", "the driver is there, but no GPU", "give the container GPUs (docker: --gpus all)")
        return
    kinds = sorted({f"{name}, {int(total) / 1024:.0f} GiB" for _, name, total, *_ in rows})
    yield ok("GPUs", f"{len(rows)} x {'; '.join(kinds)}, driver {rows[0][5]}")
    if len(kinds) > 1:
        yield warn("GPUs", "different kinds in one machine", "the slowest sets the pace: use equal ones")
    for index, _, _, used, capability, _, mig, ecc in rows:
        name = f"GPU {index}"
        if float(capability) < 8.0:
            found = f"compute capability {capability}"
            yield warn(name, found, "bfloat16 and FlashAttention-2 need 8.0: set model.dtype=float32")
        if int(used) > BUSY_MIB:
            yield warn(
                name,
                f"{int(used) / 1024:.1f} GiB in use by others",
                "nvidia-smi lists the processes; wait or end them",
            )
        if mig == "Enabled":
            yield warn(name, "split by MIG", "Ray counts one GPU: name the slices in CUDA_VISIBLE_DEVICES")
        if ecc.isdecimal() and int(ecc) > 0:
            yield fail(name, f"{ecc} uncorrected memory errors", "replace it")


def check_nccl() -> Iterator[Finding]:
    yield from judge_nccl(os.environ, [name for _, name in socket.if_nameindex()])


def judge_nccl(env: Mapping[str, str], interfaces: list[str]) -> Iterator[Finding]:
    before = 0
    for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        named = [part.lstrip("^=") for part in env.get(key, "").split(",") if part]
        unknown = [name for name in named if not any(each.startswith(name) for each in interfaces)]
        if unknown and not env[key].startswith("^"):
            before += 1
            found = f"{key} names {', '.join(unknown)}; there is {', '.join(interfaces)}"
            yield fail("collectives", found, f"unset {key}, or name one of these")
    for key, meaning in (
        ("NCCL_P2P_DISABLE", "GPUs of a node communicate through the host"),
        ("NCCL_IB_DISABLE", "nodes communicate over TCP instead of InfiniBand"),
    ):
        if env.get(key) == "1":
            before += 1
            yield warn("collectives", f"{key}=1: {meaning}", f"unset {key} unless you know why")
    if not before:
        yield ok("collectives", "no NCCL or gloo setting interferes")
