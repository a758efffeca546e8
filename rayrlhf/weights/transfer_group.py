"""A push that goes straight into the engines' memory: who meets where, and the links that carry the bytes.

Rank 0 of the trainers invites the engines to a meeting. At its address is a small store that only its members
can read and write (`weights.transfer_store`), through which they find each other, and through which one that
fails tells the others: nobody waits for a peer that is gone. Two kinds of link carry buckets:

* `GroupLink`: rank 0 broadcasts to all workers of all engines, by NCCL between GPUs or gloo between hosts.
* `IpcLink`: every trainer fills a buffer that the engine on its own device reads in place, by CUDA IPC on a
  GPU and through shared memory on a CPU.

Links only accelerate: whoever is not at a meeting, or fails there, pulls the same bytes from the object
store.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from rayrlhf.weights.failures import MeetingEnded
from rayrlhf.weights.shared_memory import SharedBuffer, attach
from rayrlhf.weights.store import TensorSlice
from rayrlhf.weights.transfer_store import Address, Member

Backend = Literal["gloo", "nccl", "ipc"]
POLL_SECONDS = 0.001
GONE_SECONDS = 2.0
ANSWER_SECONDS = 0.2  # of a store that is there
NCCL_SECONDS = 24 * 3600.0  # the deadline is ours: NCCL's own would end the process
_ABORTED: list[Store] = []  # a thread of NCCL may still hold one, and does not keep our half of it alive


@dataclass(frozen=True)
class Guest:
    """An engine at a meeting."""

    pid: int  # of its actor: a restarted one is another guest
    devices: tuple[str, ...]  # of each of its workers
    node: str = ""  # Ray's id of the node that its actor is on


@dataclass(frozen=True)
class Meeting:
    backend: Backend
    address: Address  # of its store; also tells one meeting from another
    guests: Mapping[int, Guest]  # by replica rank
    timeout_seconds: float

    @property
    def size(self) -> int:
        """Members: rank 0 of the trainers, and every worker of every engine."""
        return 1 + sum(len(guest.devices) for guest in self.guests.values())

    def first_rank(self, replica: int) -> int:
        return 1 + sum(len(guest.devices) for other, guest in self.guests.items() if other < replica)

    def readers(self, device: str) -> list[int]:
        """Ranks of the engines' workers on that device."""
        return [
            self.first_rank(replica) + worker
            for replica, guest in self.guests.items()
            for worker, its_device in enumerate(guest.devices)
            if its_device == device
        ]

    def names(self) -> dict[int, str]:
        """Whose rank is whose."""
        return {0: "the trainer"} | {
            self.first_rank(replica) + worker: f"engine {replica}"
            for replica, guest in self.guests.items()
            for worker in range(len(guest.devices))
        }


@dataclass(frozen=True)
class Delivery:
    """One push at a meeting."""

    meeting: Meeting
    number: int  # of the publication
    version: int
    buckets: tuple[tuple[TensorSlice, ...], ...]


class Link(Protocol):
    """One member's end. A sender calls `buffer`, `send` for every bucket and `flush`; a receiver calls
    `receive` and `release`. Each raises `MeetingEnded`.
    """

    def buffer(self, num_bytes: int) -> Tensor: ...
    def send(self, flat: Tensor) -> None: ...
    def flush(self) -> None: ...
    def receive(self, num_bytes: int) -> Tensor: ...
    def release(self) -> None: ...
    def end(self, why: str) -> None: ...


def join(meeting: Meeting, *, rank: int, device: torch.device, key: str) -> Link:
    """This member's link. `rank` is 0 for every trainer; `key` names its device.

    Raises `MeetingEnded` naming the members who have not come.
    """
    wire = Wire(Member(meeting.address, meeting.timeout_seconds), meeting.timeout_seconds)
    if meeting.backend == "ipc":
        return IpcLink(wire, device, key, rank=rank, readers=meeting.readers(key))
    return GroupLink(wire, meeting, rank, device)


def end_meeting(meeting: Meeting, why: str) -> None:
    """For a member that may not have joined. Where the store is gone, so is the meeting."""
    with contextlib.suppress(MeetingEnded):
        Wire(Member(meeting.address, GONE_SECONDS), 0).end(why)


class Wire:
    """A member's connection to the store, with waits that end at the deadline or with the meeting."""

    def __init__(self, member: Member, timeout_seconds: float) -> None:
        self.member = member
        self.timeout_seconds = timeout_seconds

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while not ready():
            if self.member.ended is not None:
                raise MeetingEnded(self.member.ended)
            if time.monotonic() > deadline:
                raise MeetingEnded(
                    self.member.end(f"{what} did not happen within {self.timeout_seconds:g} s")
                )
            self.member.pump(POLL_SECONDS)

    def take(self, key: str, what: str) -> bytes:
        """The value of that key, once it is there."""
        self.member.ask(key)
        self.wait(lambda: key in self.member.values, what)
        return self.member.values.pop(key)

    def end(self, why: str) -> str:
        """Everybody who waits learns why; the first reason stays, and is returned."""
        reason = self.member.end(why)
        self.member.close()
        return reason


class GroupStore(Store):
    """What a process group of torch asks of a store while it is made, over a wire."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire
        self.known: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self.wire.member.post(f"group/{key}", value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        if key not in self.known:
            self.known[key] = self.wire.take(f"group/{key}", "the making of the group")
        return self.known[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        del timeout  # the wire's is the same
        for key in keys:
            self.get(key)

    def set_timeout(self, timeout: timedelta) -> None:
        del timeout


class GroupLink:
    """A process group of this meeting alone, beside those of the trainers and of the engines."""

    def __init__(self, wire: Wire, meeting: Meeting, rank: int, device: torch.device) -> None:
        self.wire = wire
        self.device = device if meeting.backend == "nccl" else torch.device("cpu")
        self.sending: tuple[Any, Tensor] | None = None  # a bucket under way, kept alive
        wire.member.post(f"came/{rank}")
        self._wait_for_all(meeting, rank)
        self.store = GroupStore(wire)  # the group calls it, and does not keep it alive
        try:
            self.group: Any = _group(self.store, meeting, rank, wire.member.local_host())
        except MeetingEnded:
            raise
        except RuntimeError as error:
            raise MeetingEnded(wire.end(f"the group could not be made: {error}")) from error

    def _wait_for_all(self, meeting: Meeting, rank: int) -> None:
        """Only the trainer asks for everybody, so that the messages grow as the members do."""
        member = self.wire.member
        came = {f"came/{other}": name for other, name in meeting.names().items() if other != rank}
        wanted = came.keys() if rank == 0 else {"all came"}
        for key in wanted:
            member.ask(key)
        try:
            self.wire.wait(lambda: wanted <= member.values.keys(), "the meeting of all members")
        except MeetingEnded as ended:
            for key in came:
                member.ask(key)
            member.pump(ANSWER_SECONDS)
            missing = [name for key, name in came.items() if key not in member.values]
            raise MeetingEnded(f"{ended}; missing: {', '.join(dict.fromkeys(missing))}") from None
        if rank == 0:
            member.post("all came")

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def send(self, flat: Tensor) -> None:
        """Starts when the bucket before has left."""
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

    def end(self, why: str) -> None:
        self.wire.end(why)
        if self.group is not None and self.device.type == "cuda":
            self.group.abort()
            _ABORTED.append(self.store)
        # Closing the connections frees those who wait inside a collective. Gloo waits for its own first, and
        # nobody should wait for that.
        held = [self.sending, self.group]
        self.sending = self.group = None
        threading.Thread(target=held.clear, daemon=True).start()

    def _broadcast(self, flat: Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            return self.group.broadcast([flat], options)
        except RuntimeError as error:
            raise self._broken(error) from error

    def _finish(self, work: Any) -> None:
        """On the host, also for NCCL: a stream that waits for a dead peer would wait for ever."""
        self.wire.wait(work.is_completed, "a broadcast")
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def _broken(self, error: RuntimeError) -> MeetingEnded:
        return MeetingEnded(self.wire.member.end(f"a broadcast failed: {error}"))


def _group(store: Store, meeting: Meeting, rank: int, host: str) -> Any:
    """Gloo listens on `host` alone; NCCL on the interface that NCCL_SOCKET_IFNAME names."""
    if meeting.backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=meeting.timeout_seconds)
        return gloo(store, rank, meeting.size, options)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=NCCL_SECONDS)
    return dist.ProcessGroupNCCL(store, rank, meeting.size, options)


class IpcLink:
    """Buffers in memory that sender and readers share. At most two are alive: one is read, one is filled."""

    def __init__(self, wire: Wire, device: torch.device, key: str, *, rank: int, readers: list[int]) -> None:
        self.wire = wire
        self.device = device
        self.key = key
        self.rank = rank
        self.readers = readers
        self.count = 0  # buckets, on every end
        self.filling: SharedBuffer | None = None
        self.sent: dict[int, SharedBuffer] = {}

    def buffer(self, num_bytes: int) -> Tensor:
        self.filling = SharedBuffer(num_bytes, self.device)
        return self.filling.flat

    def send(self, flat: Tensor) -> None:
        assert self.filling is not None and flat is self.filling.flat
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the bytes are there before anybody may look
        self.sent[self.count], self.filling = self.filling, None
        self.wire.member.post(self._name(self.count), self.sent[self.count].handle)
        for reader in self.readers:
            self.wire.member.ask(self._read_by(self.count, reader))
        self.count += 1
        self._wait_until_read(self.count - 2)

    def flush(self) -> None:
        self._wait_until_read(self.count - 1)

    def receive(self, num_bytes: int) -> Tensor:
        handle = self.wire.take(self._name(self.count), f"bucket {self.count} on {self.key}")
        try:
            return attach(handle, self.device, num_bytes)
        except (ValueError, OSError, RuntimeError) as error:
            raise MeetingEnded(
                self.wire.member.end(f"bucket {self.count} cannot be read: {error}")
            ) from error

    def release(self) -> None:
        """What `receive` gave has been copied, and the buffer may be filled again."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.wire.member.post(self._read_by(self.count, self.rank))
        self.count += 1

    def end(self, why: str) -> None:
        self.wire.end(why)
        self.sent.clear()

    def _wait_until_read(self, count: int) -> None:
        if count not in self.sent:
            return
        receipts = {self._read_by(count, reader) for reader in self.readers}
        everybody_has = f"the reading of bucket {count} on {self.key}"
        self.wire.wait(lambda: receipts <= self.wire.member.values.keys(), everybody_has)
        for name in (self._name(count), *receipts):
            self.wire.member.drop(name)
        del self.sent[count]

    def _name(self, count: int) -> str:
        return f"bucket/{self.key}/{count}"

    def _read_by(self, count: int, rank: int) -> str:
        return f"{self._name(count)}/read/{rank}"
