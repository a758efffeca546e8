"""Trainer side of direct weight transfer: form a transfer group with the engines, then stream buckets to them
over NCCL, gloo or CUDA IPC.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import torch
from torch import Tensor

from rayrlhf.weights.buckets import Group, fill, size_of
from rayrlhf.weights.shared_memory import device_key
from rayrlhf.weights.store import AdapterSpec, TensorSlice
from rayrlhf.weights.transfer_failure import TransferFailed
from rayrlhf.weights.transfer_group import (
    Backend,
    DirectPush,
    Link,
    Receiver,
    TransferGroup,
    abort_transfer,
    join,
)
from rayrlhf.weights.transfer_store import LOOPBACK, Address, TransferStore

Answers = list[dict[str, Any]]
LIVENESS_SECONDS = 2.0  # interval of liveness checks, for engines whose death does not break a connection
RECEIVERS_PER_SECOND = 50  # that are asked whether they live
MAX_FAILURES = 2  # consecutive ones, after which all pushes go through the object store


class DirectSender:
    """Sends pushes directly to the engines. Every method is collective over the trainers.

    A failure is returned, never raised: that push then goes through the object store.
    """

    def __init__(
        self,
        backend: Backend,
        call_engines: Callable[..., Answers],
        *,
        rank: int,
        device: torch.device,
        gather: Callable[[list[Any]], list[Any]],
        timeout_seconds: float,
    ) -> None:
        """
        Args:
            call_engines: `call_engines(what, method, *arguments)` calls the method on all running engines.
            gather: concatenates the ranks' lists (all-gather).
        """
        self.backend: Backend = backend
        self.call_engines = call_engines
        self.rank = rank
        self.device = device
        self.gather = gather
        self.timeout_seconds = timeout_seconds
        self.key = device_key(device)
        locations: list[tuple[str, str]] = gather([(self.key, node_id())])
        devices = [device for device, _ in locations]
        self.devices = set(devices)
        # Nodes of the trainers that join the transfer group.
        self.nodes = {node for _, node in locations} if backend == "ipc" else {locations[0][1]}
        self.sends = rank == 0 if backend != "ipc" else devices.index(self.key) == rank
        self.node_of = dict(locations)
        nodes = [node for _, node in locations]
        self.opens_store = rank == 0 if backend != "ipc" else nodes.index(nodes[rank]) == rank
        self.link: Link | None = None
        self.transfer_group: TransferGroup | None = None
        self.transfer_store: TransferStore | None = None
        self.refused = 0  # unauthorised connections to this rank's previous transfer stores
        self.num_refused_connections = 0  # by all ranks' stores, over the run, as of the last push
        self.failures = 0
        self.is_pushing = False
        self.problem: str | None = None
        self.answers: Future[Answers] | None = None
        self.requests = ThreadPoolExecutor(2, thread_name_prefix="direct-push")
        self.finished = threading.Event()

    def start(
        self,
        number: int,
        version: int,
        buckets: Sequence[Sequence[TensorSlice]],
        adapter: AdapterSpec | None = None,
        *,
        verify: bool = False,
    ) -> bool:
        """Start a push to the reachable engines, of all weights or of an adapter alone.

        Returns:
            True if this push reaches all running engines directly.
        """
        receivers: dict[int, Receiver] = {}
        reaches_all, problem = False, None
        if self.rank == 0 and self.failures < MAX_FAILURES:
            try:
                receivers, reaches_all = self._receivers()
            except TimeoutError as error:
                problem = str(error)
        [(receivers, reaches_all, problem), *_] = self.gather([(receivers, reaches_all, problem)])
        self.problem = problem
        self.is_pushing = bool(receivers)
        if not receivers:
            return False
        try:
            transfer_group = self._form_group(receivers)
        except TransferFailed as error:  # on every rank
            self.problem = str(error)
            return False
        if self.rank == 0:
            self.finished.clear()
            push = DirectPush(transfer_group, number, version, tuple(map(tuple, buckets)), adapter, verify)
            self.answers = self.requests.submit(self._request_receive, push)
            self.requests.submit(self._monitor_receivers, transfer_group)
        if self.link is None and self._has_readers(transfer_group):
            self._try(self._join, transfer_group)
        return reaches_all

    def send(self, group: Group, slices: Sequence[TensorSlice]) -> Tensor | None:
        """Start to send one bucket.

        Returns:
            The bucket's bytes, for callers that need a copy; None if this rank sent nothing.
        """
        if not self.is_pushing or self.link is None or self.problem is not None:
            return None
        flat = self.link.buffer(size_of(slices))
        fill(flat, group, slices)
        self._try(self.link.send, flat)
        return flat

    def finish(self) -> str | None:
        """Wait until all buckets have been received. Returns the failure, if any, on every rank."""
        if self.link is not None and self.problem is None:
            self._try(self.link.flush)
        if self.answers is not None:
            try:
                self.answers.result(self.timeout_seconds)
            except Exception as error:
                self.problem = self.problem or str(error)
            self.finished.set()
            self.answers = None
        found = self.gather([(self.problem, self._num_refused())])
        self.problem = next((problem for problem, _ in found if problem), None)
        self.num_refused_connections = sum(refused for _, refused in found)
        if self.problem or self.is_pushing:
            self.failures = self.failures + 1 if self.problem else 0
        if self.problem:
            self._leave(self.problem)
        return self.problem

    def _num_refused(self) -> int:
        """Connections refused by this rank's transfer stores, over the run."""
        return self.refused + (self.transfer_store.refused if self.transfer_store is not None else 0)

    def close(self) -> None:
        self.finished.set()
        self._leave("the trainers shut down")
        self.requests.shutdown(wait=False, cancel_futures=True)

    def _receivers(self) -> tuple[dict[int, Receiver], bool]:
        """Running engines reachable through this backend, and whether these are all that run."""
        answers = self.call_engines("querying the engines' devices", "describe")
        running = {a["replica"]: _receiver(a) for a in sorted_by_replica(answers)}
        reachable = {
            replica: receiver
            for replica, receiver in running.items()
            if self.backend != "ipc" or self.devices.issuperset(receiver.devices)
        }
        return reachable, reachable == running

    def _form_group(self, receivers: dict[int, Receiver]) -> TransferGroup:
        """The current group if its receivers are the same, otherwise a new one. Collective.

        Raises:
            TransferFailed: on every rank, if a store could not be opened on one of them.
        """
        if self.transfer_group is not None and self.transfer_group.receivers == receivers:
            return self.transfer_group
        self._leave("the set of running engines changed")
        opened: list[tuple[str, Address | None, str]] = []  # node, address, problem
        if self.opens_store:
            nodes = self.nodes | {receiver.node for receiver in receivers.values()}
            try:
                self.transfer_store = TransferStore(
                    LOOPBACK if len(nodes) == 1 else ray.util.get_node_ip_address()
                )
                opened = [(self.node_of[self.key], self.transfer_store.address, "")]
            except TransferFailed as error:
                opened = [(self.node_of[self.key], None, str(error))]
        opened = self.gather(opened)
        if problem := next((problem for _, _, problem in opened if problem), None):
            raise TransferFailed(problem)
        address_of = {node: address for node, address, _ in opened if address is not None}
        stores: dict[str, Address] = {}
        if self.backend == "ipc":
            stores = {device: address_of[node] for device, node in self.node_of.items()}
        first = next(iter(address_of.values()))  # rank 0's
        self.transfer_group = TransferGroup(self.backend, first, receivers, self.timeout_seconds, stores)
        return self.transfer_group

    def _has_readers(self, transfer_group: TransferGroup) -> bool:
        """Whether any engine receives what this rank sends."""
        return self.sends and (self.backend != "ipc" or bool(transfer_group.readers(self.key)))

    def _join(self, transfer_group: TransferGroup) -> None:
        self.link = join(transfer_group, rank=0, device=self.device, key=self.key)

    def _leave(self, reason: str) -> None:
        if self.link is not None:
            self.link.end(reason)
        if self.transfer_store is not None:
            self.refused += self.transfer_store.refused
            self.transfer_store.close()
        self.link = self.transfer_group = self.transfer_store = None

    def _request_receive(self, push: DirectPush) -> Answers:
        what = f"direct push of version {push.version} by {self.backend}"
        return self.call_engines(what, "receive", push)

    def _monitor_receivers(self, transfer_group: TransferGroup) -> None:
        """End the transfer when a receiver dies: some links would only notice at their deadline."""
        period = max(LIVENESS_SECONDS, len(transfer_group.receivers) / RECEIVERS_PER_SECOND)
        while not self.finished.wait(period):
            try:
                answers = self.call_engines("checking that the engines are alive", "describe")
            except TimeoutError:  # alive but slow: its link has its own deadline
                continue
            pids = {answer["replica"]: answer["engine_pid"] for answer in answers}
            receivers = transfer_group.receivers.items()
            dead = [replica for replica, receiver in receivers if pids.get(replica) != receiver.pid]
            if dead:
                abort_transfer(transfer_group, f"engine {dead[0]} died", dead[0])
                return

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except TransferFailed as error:
            self.problem = str(error)
            if self.link is not None:  # immediately: this unblocks members that still wait for more
                self.link.end(self.problem)
                self.link = None


def node_id() -> str:
    """Ray's id of this process' node."""
    return ray.get_runtime_context().get_node_id()


def _receiver(answer: dict[str, Any]) -> Receiver:
    return Receiver(answer["engine_pid"], tuple(answer["devices"]), answer["node"])


def sorted_by_replica(answers: Answers) -> Answers:
    return sorted(answers, key=lambda answer: answer["replica"])
