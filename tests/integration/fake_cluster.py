"""A cluster of several nodes with counted, not real, GPUs on this machine.

`python -m tests.integration.fake_cluster NODES CPUS GPUS` prints its address, adds a node for each line
`add`, kills the node of a line `kill ID`, announces with a line `drain ID SECONDS` that a node will be taken
away, and ends with its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

OBJECT_STORE_BYTES = 150_000_000


class FakeCluster:
    """The parent's end: a head without slots and nodes with some."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = self._read()["address"]

    def add_node(self) -> str:
        return self._ask("add")["node"]

    def kill_node(self, node: str) -> None:
        """As by a power cut."""
        self._ask(f"kill {node}")

    def announce_removal(self, node: str, seconds: float) -> None:
        """As by a cloud that takes a spot instance back; the node itself stays until it is killed."""
        assert self._ask(f"drain {node} {seconds}") == {"accepted": True}

    def environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_ADDRESS": self.address}

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fake cluster has died"
        return json.loads(line)


@contextmanager
def fake_cluster(
    *,
    nodes: int,
    cpus: int,
    gpus: int,
    environment: dict[str, str] | None = None,
    node_environments: Sequence[dict[str, str]] = (),
) -> Iterator[FakeCluster]:
    """`environment`: of the whole cluster, this process's when left out. `node_environments`: what each of
    the first nodes has in addition.
    """
    command = [sys.executable, "-m", "tests.integration.fake_cluster", str(nodes), str(cpus), str(gpus)]
    command.append(json.dumps(list(node_environments)))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield FakeCluster(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def serve_commands(nodes: int, cpus: int, gpus: int, environments: list[dict[str, str]]) -> None:
    import ray._private.utils

    # The machine-wide note of the newest cluster is not ours to change.
    ray._private.utils.write_ray_address = lambda *_: None
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is not an answer

    def answer_with(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    limits: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES}
    head: dict[str, Any] = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, **limits}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    environments += [{}] * (nodes - len(environments))
    added = [
        cluster.add_node(num_cpus=cpus, num_gpus=gpus, env_vars=environments[index] or None, **limits)
        for index in range(nodes)
    ]
    try:
        cluster.wait_for_nodes()
        address = str(cluster.address)
        answer_with({"address": address})
        for line in sys.stdin:
            verb, *words = line.split()
            if verb == "add":
                added.append(cluster.add_node(num_cpus=cpus, num_gpus=gpus, **limits))
                cluster.wait_for_nodes()
                answer_with({"node": added[-1].node_id})
            elif verb == "drain":
                node_id, seconds = words
                answer_with({"accepted": announce_removal(address, node_id, float(seconds))})
            else:
                [node] = [node for node in added if node.node_id == words[0]]
                cluster.remove_node(node, allow_graceful=False)
                added.remove(node)
                answer_with({})
    finally:
        cluster.shutdown()


def announce_removal(address: str, node: str, seconds: float) -> bool:
    """Ray's notice of a preemption: what its autoscaler sends. Returns whether it was accepted."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated import autoscaler_pb2

    messages: Any = autoscaler_pb2  # its names are made when it is imported
    reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, problem = GcsClient(address=address).drain_node(node, reason, "a test", deadline_ms)
    if not accepted:
        print(problem, file=sys.stderr)
    return accepted


if __name__ == "__main__":
    nodes, cpus, gpus = map(int, sys.argv[1:4])
    serve_commands(nodes, cpus, gpus, json.loads(sys.argv[4]))
