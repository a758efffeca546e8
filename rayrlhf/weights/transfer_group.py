"""Transfer group of trainers and engines for direct weight pushes, and the links that carry the bytes.

Rank 0 of the trainers opens a small key-value store that only group members can read and write
(`weights.transfer_store`) and sends its address to the engines. Members use it for rendezvous and to report
failures, so that no member waits for a dead peer. By IPC each bucket takes some messages and stays on its
node, and so do they: every node has a store. Two kinds of link carry buckets:

* `GroupLink`: rank 0 broadcasts to all workers of all engines, by NCCL between GPUs or gloo between hosts.
* `IpcLink`: every trainer fills a buffer that the engine on its own device reads in place, by CUDA IPC on a
  GPU and through shared memory on a CPU.

Links are an optimisation: an engine that is not in the group, or fails in it, pulls the same bytes from the
object store.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from rayrlhf.weights.shared_memory import SharedBuffer, attach
from rayrlhf.weights.transfer_failure import TransferFailed
from rayrlhf.weights.transfer_store import Address, Member

if TYPE_CHECKING:
    from rayrlhf.weights.store import AdapterSpec, TensorSlice  # which imports Ray

Backend = Literal["gloo", "nccl", "ipc"]
POLL_SECONDS = 0.001
ABORT_CONNECT_SECONDS = 2.0  # to reach the store in `abort_transfer`
ANSWER_SECONDS = 0.2  # for the answer of a reachable store
NCCL_SECONDS = 24 * 3600.0  # our own deadline applies: NCCL's would abort the process
_ABORTED: list[Store] = []  # an NCCL thread may still use one, but holds no reference to its Python part


@dataclass(frozen=True)
class Receiver:
    """An engine in a transfer group."""

    pid: int  # of its actor: a restarted engine is a different receiver
    devices: tuple[str, ...]  # device key of each of its workers
    node: str = ""  # Ray node id of its actor


@dataclass(frozen=True)
class TransferGroup:
    """Members of direct pushes: trainers have rank 0, engine workers the other ranks."""

    backend: Backend
    address: Address  # of its store, or of rank 0's; also identifies the group
    receivers: Mapping[int, Receiver]  # by replica rank
    timeout_seconds: float
    stores: Mapping[str, Address] = field(default_factory=dict)  # of a node, by device key; without IPC none

    def store_of(self, device: str) -> Address:
        """Address of the store that members on this device use."""
        return self.stores.get(device, self.address)

    @property
    def size(self) -> int:
        """Number of ranks: rank 0 of the trainers and every worker of every engine."""
        return 1 + sum(len(receiver.devices) for receiver in self.receivers.values())

    def first_rank(self, replica: int) -> int:
        return 1 + sum(len(receiver.devices) for other, receiver in self.receivers.items() if other < replica)

    def readers(self, device: str) -> list[int]:
        """Ranks of the engine workers on that device."""
        return [
            self.first_rank(replica) + worker
            for replica, receiver in self.receivers.items()
            for worker, worker_device in enumerate(receiver.devices)
            if worker_device == device
        ]

    def names(self) -> dict[int, str]:
        """Name of each rank's process, for messages."""
        return {0: "the trainer"} | {
            self.first_rank(replica) + worker: f"engine {replica}"
            for replica, receiver in self.receivers.items()
            for worker in range(len(receiver.devices))
        }


@dataclass(frozen=True)
class DirectPush:
    """One weight push to a transfer group."""

    transfer_group: TransferGroup
    number: int  # of the publication
    version: int
    buckets: tuple[tuple[TensorSlice, ...], ...]
    adapter: AdapterSpec | None = None  # None: the buckets hold all weights
    verify: bool = False  # as in `Publication`


class Link(Protocol):
    """One member's endpoint. A sender calls `buffer` and `send` for every bucket, then `flush`; a receiver
    calls `receive` and `release` for every bucket. Each raises `TransferFailed`.
    """

    def buffer(self, num_bytes: int) -> Tensor: ...
    def send(self, flat: Tensor) -> None: ...
    def flush(self) -> None: ...
    def receive(self, num_bytes: int) -> Tensor: ...
    def release(self) -> None: ...
    def end(self, reason: str) -> None: ...


def join(transfer_group: TransferGroup, *, rank: int, device: torch.device, key: str) -> Link:
    """Join the group and return this member's link.

    Args:
        rank: in the group; 0 for every trainer.
        key: device key of this member.

    Raises:
        TransferFailed: names the members that did not join.
    """
    connection = Connection(
        Member(transfer_group.store_of(key), transfer_group.timeout_seconds), transfer_group.timeout_seconds
    )
    if transfer_group.backend == "ipc":
        return IpcLink(connection, device, key, rank=rank, readers=transfer_group.readers(key))
    return GroupLink(connection, transfer_group, rank, device)


def abort_transfer(transfer_group: TransferGroup, reason: str, replica: int) -> None:
    """End the transfer for all members that share a store with an engine; callable without having joined.
    No-op for a store that is unreachable.
    """
    for address in {transfer_group.store_of(device) for device in transfer_group.receivers[replica].devices}:
        with contextlib.suppress(TransferFailed):
            Connection(Member(address, ABORT_CONNECT_SECONDS), 0).end(reason)


class Connection:
    """A member's connection to the store, with waits that stop at the deadline or when the transfer ends."""

    def __init__(self, member: Member, timeout_seconds: float) -> None:
        self.member = member
        self.timeout_seconds = timeout_seconds

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while not ready():
            if self.member.end_reason is not None:
                raise TransferFailed(self.member.end_reason)
            if time.monotonic() > deadline:
                raise TransferFailed(
                    self.member.end(f"timed out after {self.timeout_seconds:g} s waiting for {what}")
                )
            self.member.pump(POLL_SECONDS)

    def take(self, key: str, what: str) -> bytes:
        """Wait for the value of a key and remove it from the received values."""
        self.member.ask(key)
        self.wait(lambda: key in self.member.values, what)
        return self.member.values.pop(key)

    def end(self, reason: str) -> str:
        """End the transfer for all members. Returns the reason; if there was an earlier one, that one."""
        reason = self.member.end(reason)
        self.member.close()
        return reason


class GroupStore(Store):
    """The part of torch's `Store` interface that a process group uses for rendezvous."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self.connection.member.post(f"group/{key}", value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        if key not in self.values:
            self.values[key] = self.connection.take(f"group/{key}", "the rendezvous of the process group")
        return self.values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        del timeout  # the connection has the same timeout
        for key in keys:
            self.get(key)

    def set_timeout(self, timeout: timedelta) -> None:
        del timeout


class GroupLink:
    """Link over a separate process group, in addition to those of the trainers and of the engines."""

    def __init__(
        self, connection: Connection, transfer_group: TransferGroup, rank: int, device: torch.device
    ) -> None:
        self.connection = connection
        self.device = device if transfer_group.backend == "nccl" else torch.device("cpu")
        self.sending: tuple[Any, Tensor] | None = None  # (work, bucket) in flight; keeps the bucket alive
        self.rank = rank
        self.others = {other: name for other, name in transfer_group.names().items() if other != rank}
        self.is_connected = False  # to the other members, which happens in the first broadcast
        connection.member.post(f"joined/{rank}")
        self._wait_for_all()
        self.store = GroupStore(connection)  # the process group calls it but holds no reference
        try:
            self.group: Any = _group(self.store, transfer_group, rank, connection.member.local_host())
        except TransferFailed:
            raise
        except RuntimeError as error:
            raise TransferFailed(
                connection.end(f"the process group could not be created: {error}")
            ) from error

    def _wait_for_all(self) -> None:
        """Only the trainer waits for every member: the number of messages stays linear in the group size."""
        member = self.connection.member
        joined = {f"joined/{other}" for other in self.others}
        wanted = joined if self.rank == 0 else {"all joined"}
        for key in wanted:
            member.ask(key)
        try:
            self.connection.wait(lambda: wanted <= member.values.keys(), "all members to join")
        except TransferFailed as error:
            raise TransferFailed(f"{error}; missing: {self._without('joined')}") from None
        if self.rank == 0:
            member.post("all joined")

    def _without(self, what: str) -> str:
        """Names of the members that have not posted `what`."""
        member = self.connection.member
        for other in self.others:
            member.ask(f"{what}/{other}")
        member.pump(ANSWER_SECONDS)
        missing = [name for other, name in self.others.items() if f"{what}/{other}" not in member.values]
        return ", ".join(dict.fromkeys(missing)) or "nobody"

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def send(self, flat: Tensor) -> None:
        """Starts when the previous bucket has been sent."""
        self.flush()
        self.sending = (self._broadcast(flat), flat)

    def flush(self) -> None:
        if self.sending is not None:
            self._finish(self.sending[0])
            self.sending = None

    def receive(self, num_bytes: int) -> Tensor:
        flat = self.buffer(num_bytes)
        self._finish(self._broadcast(flat))
        return flat

    def release(self) -> None:
        pass

    def end(self, reason: str) -> None:
        self.connection.end(reason)
        if self.group is not None and self.device.type == "cuda":
            if self.is_connected:
                self.group.abort()
            else:  # it may block as long as the broadcast that connects
                threading.Thread(target=self.group.abort, daemon=True).start()
            _ABORTED.append(self.store)
        # Closing the connections unblocks members that wait inside a collective. Gloo first waits for its own
        # pending work, so this runs in a thread.
        held = [self.sending, self.group]
        self.sending = self.group = None
        threading.Thread(target=held.clear, daemon=True).start()

    def _broadcast(self, flat: Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            if self.is_connected:
                return self.group.broadcast([flat], options)
            return self._connect(lambda: self.group.broadcast([flat], options))
        except TransferFailed:
            raise
        except RuntimeError as error:
            raise self._broken(error) from error

    def _connect(self, broadcast: Callable[[], Any]) -> Any:
        """The first broadcast, in which NCCL blocks the calling thread until every member has called it, for
        ever if one does not: in a thread that is left behind at the deadline.
        """
        member, outcome = self.connection.member, Future[Any]()
        member.post(f"connecting/{self.rank}")

        def call() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                outcome.set_result(broadcast())
                member.post(f"connected/{self.rank}")
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=call, daemon=True, name="connect").start()
        try:
            self.connection.wait(outcome.done, "the members to connect")
        except TransferFailed as error:
            not_begun, not_connected = self._without("connecting"), self._without("connected")
            raise TransferFailed(f"{error}; not begun: {not_begun}; not connected: {not_connected}") from None
        self.is_connected = True
        return outcome.result()

    def _finish(self, work: Any) -> None:
        """Waits on the host, also for NCCL: a stream that waits for a dead peer would wait forever."""
        self.connection.wait(work.is_completed, "a broadcast")
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def _broken(self, error: RuntimeError) -> TransferFailed:
        return TransferFailed(self.connection.member.end(f"a broadcast failed: {error}"))


def _group(store: Store, transfer_group: TransferGroup, rank: int, host: str) -> Any:
    """Create the process group. Gloo listens only on `host`; NCCL on the interface NCCL_SOCKET_IFNAME."""
    if transfer_group.backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=transfer_group.timeout_seconds)
        return gloo(store, rank, transfer_group.size, options)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=NCCL_SECONDS)
    return dist.ProcessGroupNCCL(store, rank, transfer_group.size, options)


class IpcLink:
    """Buffers in memory that sender and readers share. At most two are alive: one being read, one filled."""

    def __init__(
        self, connection: Connection, device: torch.device, key: str, *, rank: int, readers: list[int]
    ) -> None:
        self.connection = connection
        self.device = device
        self.key = key
        self.rank = rank
        self.readers = readers
        self.count = 0  # buckets sent or received so far
        self.filling: SharedBuffer | None = None
        self.sent: dict[int, SharedBuffer] = {}

    def buffer(self, num_bytes: int) -> Tensor:
        self.filling = SharedBuffer(num_bytes, self.device)
        return self.filling.flat

    def send(self, flat: Tensor) -> None:
        assert self.filling is not None and flat is self.filling.flat
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # complete the bytes before a reader sees them
        self.sent[self.count], self.filling = self.filling, None
        self.connection.member.post(self._bucket_key(self.count), self.sent[self.count].handle)
        for reader in self.readers:
            self.connection.member.ask(self._read_key(self.count, reader))
        self.count += 1
        self._wait_until_read(self.count - 2)

    def flush(self) -> None:
        self._wait_until_read(self.count - 1)

    def receive(self, num_bytes: int) -> Tensor:
        handle = self.connection.take(self._bucket_key(self.count), f"bucket {self.count} on {self.key}")
        try:
            return attach(handle, self.device, num_bytes)
        except (ValueError, OSError, RuntimeError) as error:
            raise TransferFailed(
                self.connection.member.end(f"bucket {self.count} cannot be read: {error}")
            ) from error

    def release(self) -> None:
        """Report that the received bucket has been copied, so that the sender may refill the buffer."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.connection.member.post(self._read_key(self.count, self.rank))
        self.count += 1

    def end(self, reason: str) -> None:
        self.connection.end(reason)
        self.sent.clear()

    def _wait_until_read(self, count: int) -> None:
        if count not in self.sent:
            return
        acknowledgements = {self._read_key(count, reader) for reader in self.readers}
        what = f"bucket {count} to be read on {self.key}"
        self.connection.wait(lambda: acknowledgements <= self.connection.member.values.keys(), what)
        for key in (self._bucket_key(count), *acknowledgements):
            self.connection.member.drop(key)
        del self.sent[count]

    def _bucket_key(self, count: int) -> str:
        return f"bucket/{self.key}/{count}"

    def _read_key(self, count: int, rank: int) -> str:
        return f"{self._bucket_key(count)}/read/{rank}"
