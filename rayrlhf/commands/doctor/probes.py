"""Checks that run something: a collective between two processes, and a Ray cluster.

Each runs in separate processes (`python -m rayrlhf.commands.doctor.probes NAME …`): it imports torch or Ray.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from rayrlhf.commands.doctor.finding import Finding, fail, ok, warn

COLLECTIVE_SECONDS = 60.0
RAY_SECONDS = 90.0
CONNECT_SECONDS = 10.0


def check_collective() -> Iterator[Finding]:
    """Two processes add up their ranks + 1 over gloo; over NCCL too where there are two GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "rayrlhf.commands.doctor.probes",
            "collective",
            f"file://{folder}/store",
        ]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            outputs = [rank.communicate(timeout=COLLECTIVE_SECONDS) for rank in ranks]
        except subprocess.TimeoutExpired:
            fix = "GLOO_SOCKET_IFNAME with the network interface to use"
            yield fail("two processes", f"no sum within {COLLECTIVE_SECONDS:g} s", fix)
            return
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    yield from judge_collective([out for out, _ in outputs], [err for _, err in outputs])


def judge_collective(outputs: list[str], errors: list[str]) -> Iterator[Finding]:
    for output, error in zip(outputs, errors, strict=True):
        if not output.strip():
            last = (error.strip().splitlines() or ["no answer"])[-1]
            yield fail("two processes", last, "python -c 'import torch.distributed' must work")
            return
    sums: list[dict[str, float]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    for backend in sums[0]:
        if all(each[backend] == 3.0 for each in sums):
            yield ok("two processes", f"add up over {backend}")
        else:
            yield fail("two processes", f"{backend} gave {sums}, not 3", "another torch, or its network")


def check_ray(address: str | None) -> Iterator[Finding]:
    """Join the cluster at `address`, or start a tiny one and stop it."""
    refusal = _refusal(address) if address else None
    if refusal is not None:
        yield fail("ray", f"{address}: {refusal}", "start the cluster, or correct the address and its port")
        return
    command = [sys.executable, "-m", "rayrlhf.commands.doctor.probes", "ray", address or ""]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RAY_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        where = f"the cluster at {address}" if address else "a local Ray"
        yield fail("ray", f"{where} did not answer within {RAY_SECONDS:g} s", "`ray status`; ports and token")
        return
    yield from judge_ray(done.returncode, done.stdout, done.stderr, address)


def _refusal(address: str) -> str | None:
    """Why host:port refuses connections, or None; Ray itself would retry for long."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return None  # "auto", or a name
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def judge_ray(code: int, output: str, error: str, address: str | None) -> Iterator[Finding]:
    if code or not output.strip():
        last = (error.strip().splitlines() or ["no answer"])[-1]
        fix = "the address, its token and its Ray's version" if address else "see the message"
        yield fail("ray", last, fix)
        return
    seen: dict[str, Any] = json.loads(output.splitlines()[-1])
    where = f"the cluster at {address}" if address else "a local Ray"
    nodes = f"{seen['nodes']} node{'s' * (seen['nodes'] != 1)}"
    yield ok("ray", f"{where}: {nodes}, {seen['total']}; free {seen['free']}")
    if seen["pending"]:
        pending = f"{len(seen['pending'])} placement groups wait for resources: {', '.join(seen['pending'])}"
        yield warn("ray", pending, "another job waits for slots; yours would be scheduled after it")
    if seen["serve"]:
        yield ok("serve", f"runs there, with {', '.join(seen['serve'])}")
    else:
        yield ok("serve", "no application yet: a job starts Serve by itself")


def collective(init_method: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    sums: dict[str, float] = {}
    backends = ["gloo"] + (["nccl"] if torch.cuda.device_count() >= 2 else [])
    for backend in backends:
        dist.init_process_group(backend, init_method=init_method + backend, rank=rank, world_size=2)
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        value = torch.tensor([rank + 1.0], device=device)
        dist.all_reduce(value)
        sums[backend] = float(value)
        dist.destroy_process_group()
    print(json.dumps(sums))


def ray_cluster(address: str) -> None:
    import logging

    import ray
    from ray.util import placement_group_table

    from rayrlhf.runtime.local_ray import private_ray

    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        with private_ray():
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)  # dicts, whatever its annotation says
    serve: list[str] = []
    if any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in named):
        from ray import serve as ray_serve

        serve = sorted(ray_serve.status().applications)
    groups = placement_group_table().values()
    seen = {
        "nodes": sum(bool(node["Alive"]) for node in ray.nodes()),
        "total": _resources_text(ray.cluster_resources()),
        "free": _resources_text(ray.available_resources()),
        "pending": [group["name"] or "unnamed" for group in groups if group["state"] == "PENDING"],
        "serve": serve,
    }
    print(json.dumps(seen))
    ray.shutdown()


def _resources_text(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


if __name__ == "__main__":
    if sys.argv[1] == "collective":
        collective(sys.argv[2], int(sys.argv[3]))
    else:
        ray_cluster(sys.argv[2])
