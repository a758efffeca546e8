"""Memory, limits, ports and disks of this machine."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from rayrlhf.commands.doctor.finding import Finding, fail, ok, warn

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_SHARE = 0.3  # of memory, which Ray gives its object store by default
NETWORK_FILESYSTEMS = ("nfs", "nfs4", "lustre", "cifs", "fuse", "gpfs", "beegfs", "ceph", "9p", "virtiofs")
# Ray's default ports (ray start --help).
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard", 8000: "Serve over HTTP", 10001: "Ray client"}
RAY_FULL_DISK = 0.95  # above it Ray writes nothing more to a disk


def check_shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        yield fail("shared memory", f"there is no {SHARED_MEMORY}", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    yield judge_shared_memory(usage.total, usage.free, psutil.virtual_memory().total)


def judge_shared_memory(total: int, free: int, memory: int) -> Finding:
    found = f"/dev/shm has {total / GIB:.1f} GiB, {free / GIB:.1f} free"
    fix = "docker: --shm-size; Kubernetes: a Memory emptyDir at /dev/shm (`rayrlhf render` does it)"
    if total < GIB:
        return fail("shared memory", found, fix)
    if total < OBJECT_STORE_SHARE * memory:
        wanted = f"; Ray's object store wants {OBJECT_STORE_SHARE * memory / GIB:.1f}"
        return warn("shared memory", found + wanted, fix)
    return ok("shared memory", found)


def check_memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield judge_memory(memory.total, memory.available, cgroup_memory())
    yield judge_cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), cgroup_cpus())


def judge_memory(total: int, available: int, limit: int | None) -> Finding:
    bound = min(total, limit) if limit is not None else total
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if limit is not None and limit < total:
        found += f", but this container may use {limit / GIB:.1f}"
    if bound < 8 * GIB:
        return warn("memory", found, "the demo needs about 8 GiB: a larger machine or container")
    return ok("memory", found)


def judge_cores(cores: int, allowed: int, limit: float | None) -> Finding:
    usable = min(allowed, limit) if limit is not None else allowed
    found = f"{cores} cores"
    if usable < cores:
        found += f", of which this process may use {usable:g}"
        return warn(
            "cores", found, f"ray start --num-cpus={max(1, int(usable))}, which by default counts all"
        )
    return ok("cores", found)


def cgroup_memory() -> int | None:
    """The container's limit in bytes (cgroup v2)."""
    text = _cgroup("memory.max")
    return int(text) if text is not None and text.isdecimal() else None


def cgroup_cpus() -> float | None:
    """The container's limit in cores (cgroup v2)."""
    text = _cgroup("cpu.max")
    if text is None or text.startswith("max"):
        return None
    quota, period = map(int, text.split())
    return quota / period


def _cgroup(name: str) -> str | None:
    file = Path("/sys/fs/cgroup") / name
    return file.read_text().strip() if file.is_file() else None


def check_limits() -> Iterator[Finding]:
    yield judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield judge_processes(resource.getrlimit(resource.RLIMIT_NPROC)[0])


def judge_open_files(limit: int) -> Finding:
    found = f"at most {'unlimited' if limit == resource.RLIM_INFINITY else limit} open files"
    fix = "ulimit -n 65536 before `ray start`, or LimitNOFILE of the service"
    if limit == resource.RLIM_INFINITY or limit >= 8192:
        return ok("open files", found)
    return (fail if limit < 1024 else warn)("open files", found, fix)


def judge_processes(limit: int) -> Finding:
    found = f"at most {'unlimited' if limit == resource.RLIM_INFINITY else limit} processes and threads"
    if limit == resource.RLIM_INFINITY or limit >= 4096:
        return ok("processes", found)
    return warn("processes", found, "ulimit -u 65536: Ray and torch start hundreds of threads")


def check_ports() -> Iterator[Finding]:
    taken = [f"{port} ({what})" for port, what in PORTS.items() if _is_taken(port)]
    yield judge_ports(taken)


def judge_ports(taken: list[str]) -> Finding:
    if not taken:
        return ok("ports", f"{', '.join(map(str, PORTS))} are free")
    found = f"in use: {', '.join(taken)}"
    return warn("ports", found, "fine if it is your Ray (check with `ray status`); else other --port options")


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_disks(run_path: Path) -> Iterator[Finding]:
    folder = next(path for path in (run_path, *run_path.absolute().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    yield judge_run_folder(run_path, os.access(folder, os.W_OK), usage.free, filesystem_of(folder))
    temp = shutil.disk_usage("/tmp")
    yield judge_temp(1 - temp.free / temp.total, temp.free)


def judge_run_folder(run_path: Path, writable: bool, free: int, filesystem: str) -> Finding:
    found = f"{run_path}: {free / GIB:.1f} GiB free on {filesystem}"
    if not writable:
        return fail("run folder", f"{run_path} cannot be written to", "another run.dir, or its permissions")
    if free < 5 * GIB:
        return warn("run folder", found, "another run.dir: a checkpoint holds 16 bytes per parameter")
    if not filesystem.startswith(NETWORK_FILESYSTEMS):
        found += "; for several nodes run.dir must be on a file system that they share"
    return ok("run folder", found)


def judge_temp(used: float, free: int) -> Finding:
    found = f"/tmp is {used:.0%} full, {free / GIB:.1f} GiB free"
    if used > RAY_FULL_DISK:
        return fail("temporary files", found, "free some of it: Ray stops spilling objects above 95 %")
    if used > 0.85:
        return warn("temporary files", found, "Ray stops spilling objects above 95 %")
    return ok("temporary files", found)


def filesystem_of(path: Path) -> str:
    mounts = [p for p in psutil.disk_partitions(all=True) if path.absolute().is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "an unknown file system"
