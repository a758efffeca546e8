"""A push that goes straight into the engines' memory: who meets where, and the links that carry the bytes.

Rank 0 of the trainers invites the engines to a meeting. At its address is a small key-value store
(torch's TCPStore), through which they find each other, and through which one that fails tells the others:
nobody waits for a peer that is gone. Two kinds of link carry buckets:

* `GroupLink`: rank 0 broadcasts to all workers of all engines, by NCCL between GPUs or gloo between hosts.
* `IpcLink`: every trainer fills a buffer that the engine on its own device reads in place, by CUDA IPC on a
  GPU and through shared memory on a CPU.

Links only accelerate: whoever is not at a meeting, or fails there, pulls the same bytes from the object
store.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rayrlhf.rollout.device_memory import SharedBuffer, attach
from rayrlhf.rollout.hub import TensorSlice

Backend = Literal["gloo", "nccl", "ipc"]
POLL_SECONDS = 0.001
ATTEMPT_SECONDS = 2.0
SETTLE_SECONDS = 0.3
GONE_SECONDS = 2.0
ENDED = "ended"  # key: why the meeting is over
NCCL_SECONDS = 24 * 3600.0  # the deadline is ours: NCCL's own would end the process


class MeetingEnded(RuntimeError):
    """A peer failed or did not come in time; the message says who."""


@dataclass(frozen=True)
class Guest:
    """An engine at a meeting."""

    pid: int  # of its actor: a restarted one is another guest
    devices: tuple[str, ...]  # of each of its workers


@dataclass(frozen=True)
class Meeting:
    backend: Backend
    host: str
    port: int  # also tells one meeting from another
    guests: Mapping[int, Guest]  # by replica rank
    timeout_seconds: float

    @property
    def size(self) -> int:
        """Members: rank 0 of the trainers, and every worker of every engine."""
        return 1 + sum(len(guest.devices) for guest in self.guests.values())

    def first_rank(self, replica: int) -> int:
        return 1 + sum(len(guest.devices) for other, guest in self.guests.items() if other < replica)

    def readers(self, device: str) -> int:
        """How many workers of engines are on that device."""
        return sum(guest.devices.count(device) for guest in self.guests.values())


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


def open_store(timeout_seconds: float) -> TCPStore:
    """The store of a new meeting, on this host at a free port."""
    attempt = timedelta(seconds=ATTEMPT_SECONDS)

    def listen() -> TCPStore:
        return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=attempt)

    store = _again_until(timeout_seconds, listen)
    time.sleep(SETTLE_SECONDS)
    return store


def _connect(meeting: Meeting, timeout_seconds: float) -> TCPStore:
    """Raises `MeetingEnded` at the deadline."""
    attempt = timedelta(seconds=min(ATTEMPT_SECONDS, timeout_seconds))
    return _again_until(
        timeout_seconds, lambda: TCPStore(meeting.host, meeting.port, is_master=False, timeout=attempt)
    )


def _again_until(timeout_seconds: float, connect: Callable[[], TCPStore]) -> TCPStore:
    """A connection to a port that has just been opened may get stuck; the next one does not."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            store = connect()
        except dist.DistError as error:
            if time.monotonic() > deadline:
                raise MeetingEnded(f"the store of the meeting could not be reached: {error}") from error
        else:
            store.set_timeout(timedelta(seconds=timeout_seconds))
            return store


def join(meeting: Meeting, *, rank: int, device: torch.device, key: str, store: Store | None = None) -> Link:
    """This member's link. `rank` is 0 for every trainer; `key` names its device; the host brings its `store`.

    Raises `MeetingEnded` naming the members who have not come.
    """
    if store is None:
        store = _connect(meeting, meeting.timeout_seconds)
    wire = Wire(store, meeting.timeout_seconds)
    if meeting.backend == "ipc":
        return IpcLink(wire, device, key, readers=meeting.readers(key))
    return GroupLink(wire, meeting, rank, device)


def end_meeting(meeting: Meeting, why: str) -> None:
    """For a member that may not have joined. Where the store is gone, so is the meeting."""
    with contextlib.suppress(MeetingEnded):
        Wire(_connect(meeting, GONE_SECONDS), 0).end(why)


class Wire:
    """The store of a meeting, with waits that end at the deadline or with the meeting."""

    def __init__(self, store: Store, timeout_seconds: float) -> None:
        self.store = store
        self.timeout_seconds = timeout_seconds

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        try:
            while not ready():
                if self.store.check([ENDED]):
                    raise MeetingEnded(self.reason())
                if time.monotonic() > deadline:
                    self.end(f"{what} did not happen within {self.timeout_seconds:g} s")
                    raise MeetingEnded(self.reason())
                time.sleep(POLL_SECONDS)
        except dist.DistError as error:
            raise MeetingEnded("its host, rank 0 of the trainers, has gone") from error

    def end(self, why: str) -> None:
        """Everybody who waits learns why; the first reason stays."""
        with contextlib.suppress(dist.DistError):  # without its host, it has ended already
            self.store.compare_set(ENDED, "", why)

    def reason(self) -> str:
        return self.store.get(ENDED).decode()


class GroupLink:
    """A process group of this meeting alone, beside those of the trainers and of the engines."""

    def __init__(self, wire: Wire, meeting: Meeting, rank: int, device: torch.device) -> None:
        self.wire = wire
        self.device = device if meeting.backend == "nccl" else torch.device("cpu")
        self.sending: tuple[Any, Tensor] | None = None  # a bucket under way, kept alive
        wire.store.set(f"came/{rank}", "")
        names = {0: "the trainer"} | {
            meeting.first_rank(replica) + worker: f"engine {replica}"
            for replica, guest in meeting.guests.items()
            for worker in range(len(guest.devices))
        }
        missing = [name for other, name in names.items() if other != rank]

        def all_came() -> bool:
            nonlocal missing
            missing = [name for other, name in names.items() if not wire.store.check([f"came/{other}"])]
            return not missing

        try:
            wire.wait(all_came, "the meeting of all members")
        except MeetingEnded as ended:
            if missing:
                raise MeetingEnded(f"{ended}; missing: {', '.join(dict.fromkeys(missing))}") from None
            raise
        self.group: Any = _group(PrefixStore("group", wire.store), meeting, rank)

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
        why = f"a broadcast failed: {error}"
        self.wire.end(why)
        try:
            return MeetingEnded(self.wire.reason())
        except dist.DistError:
            return MeetingEnded(why)


def _group(store: Store, meeting: Meeting, rank: int) -> Any:
    if meeting.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, meeting.size, timedelta(seconds=meeting.timeout_seconds))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=NCCL_SECONDS)
    return dist.ProcessGroupNCCL(store, rank, meeting.size, options)


class IpcLink:
    """Buffers in memory that sender and readers share. At most two are alive: one is read, one is filled."""

    def __init__(self, wire: Wire, device: torch.device, key: str, *, readers: int) -> None:
        self.wire = wire
        self.device = device
        self.key = key
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
        self.wire.store.set(self._name(self.count), _text(self.sent[self.count].handle))
        self.count += 1
        self._wait_until_read(self.count - 2)

    def flush(self) -> None:
        self._wait_until_read(self.count - 1)

    def receive(self, num_bytes: int) -> Tensor:
        name = self._name(self.count)
        self.wire.wait(lambda: self.wire.store.check([name]), f"bucket {self.count} on {self.key}")
        return attach(pickle.loads(base64.b85decode(self.wire.store.get(name))), self.device)

    def release(self) -> None:
        """What `receive` gave has been copied, and the buffer may be filled again."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.wire.store.add(self._name(self.count) + "/read", 1)
        self.count += 1

    def end(self, why: str) -> None:
        self.wire.end(why)
        self.sent.clear()

    def _wait_until_read(self, count: int) -> None:
        if count not in self.sent:
            return
        name = self._name(count) + "/read"
        everybody_has = f"the reading of bucket {count} on {self.key}"
        self.wire.wait(lambda: self.wire.store.add(name, 0) >= self.readers, everybody_has)
        self.wire.store.delete_key(self._name(count))
        self.wire.store.delete_key(name)
        del self.sent[count]

    def _name(self, count: int) -> str:
        return f"bucket/{self.key}/{count}"


def _text(handle: Any) -> str:
    return base64.b85encode(pickle.dumps(handle)).decode()
