"""Links between a trainer and engines, with a thread per member; with processes: tests/integration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.weights import transfer_group as transfer_group_module
from rayrlhf.weights.shared_memory import SharedBuffer, attach
from rayrlhf.weights.transfer_failure import TransferFailed
from rayrlhf.weights.transfer_group import Backend, Link, Receiver, TransferGroup, abort_transfer, join
from rayrlhf.weights.transfer_store import Address, TransferStore

CPU = torch.device("cpu")
SIZES = [1000, 1, 70_000, 16]
RECEIVERS = {0: Receiver(10, ("node",)), 2: Receiver(12, ("node", "node"))}  # engine 1 is missing


def bucket(index: int) -> Tensor:
    return (torch.arange(SIZES[index]) % 251 + index).to(torch.uint8)


@pytest.fixture(autouse=True)
def stores() -> Iterator[list[TransferStore]]:
    """Closes the stores a test has opened."""
    yield OPENED
    while OPENED:
        OPENED.pop().close()


OPENED: list[TransferStore] = []


class Members:
    """The trainer and every worker of the engines."""

    def __init__(self, backend: Backend, *, seconds: float = 20.0) -> None:
        self.store = TransferStore()
        OPENED.append(self.store)
        self.transfer_group = TransferGroup(backend, self.store.address, RECEIVERS, seconds)
        self.pool = ThreadPoolExecutor(self.transfer_group.size)

    def run(self, member: Callable[[Link], Any], rank: int) -> Future[Any]:
        def join_and_run() -> Any:
            link = join(self.transfer_group, rank=rank, device=CPU, key="node")
            try:
                return member(link)
            except TransferFailed as error:
                link.end(str(error))  # as engines and trainers do: gloo's group would block when it is freed
                raise

        return self.pool.submit(join_and_run)


def send(link: Link, *, pushes: int = 1) -> None:
    for _ in range(pushes):
        for index, size in enumerate(SIZES):
            flat = link.buffer(size)
            flat.copy_(bucket(index))
            link.send(flat)
        link.flush()


def receive(link: Link, *, pushes: int = 1) -> list[Tensor]:
    got: list[Tensor] = []
    for _ in range(pushes):
        for size in SIZES:
            got.append(link.receive(size).clone())
            link.release()
    return got


def test_ranks_of_a_transfer_group() -> None:
    transfer_group = TransferGroup("gloo", Address("tcp://host:1", b"", b"", b""), RECEIVERS, 1.0)
    assert transfer_group.size == 4
    assert (transfer_group.first_rank(0), transfer_group.first_rank(2)) == (1, 2)
    assert transfer_group.readers("node") == [1, 2, 3] and transfer_group.readers("elsewhere") == []


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_every_worker_gets_every_byte_push_after_push(backend: Backend) -> None:
    members = Members(backend)
    sender = members.run(lambda link: send(link, pushes=2), 0)
    receivers = [members.run(lambda link: receive(link, pushes=2), rank) for rank in (1, 2, 3)]
    sender.result(30)
    for receiver in receivers:
        for index, got in enumerate(receiver.result(30)):
            assert torch.equal(got, bucket(index % len(SIZES)))


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_member_that_fails_unblocks_the_others_immediately(backend: Backend) -> None:
    def fails(link: Link) -> None:
        link.receive(SIZES[0])
        link.release()
        link.end("engine 2: out of memory")

    members = Members(backend)
    started = time.monotonic()
    members = [members.run(send, 0), *(members.run(receive, rank) for rank in (1, 2)), members.run(fails, 3)]
    members[3].result(30)
    for member in members[:3] if backend == "gloo" else members[:1]:  # a reader may have everything already
        with pytest.raises(TransferFailed, match=r"engine 2: out of memory|a broadcast failed"):
            member.result(30)
    assert time.monotonic() - started < 10, "long before the deadline of 20 s"


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_member_that_never_joined_can_end_the_transfer(backend: Backend) -> None:
    members = Members(backend)
    sender = members.run(send, 0)
    abort_transfer(members.transfer_group, "engine 2: asleep", 2)
    with pytest.raises(TransferFailed, match="engine 2: asleep"):
        sender.result(30)
    members.store.close()
    abort_transfer(members.transfer_group, "too late", 2)  # the store is closed


def test_a_transfer_ends_when_the_sender_is_gone() -> None:
    members = Members("ipc")
    reader = members.run(lambda link: link.receive(10), 1)
    time.sleep(0.5)
    members.store.close()
    with pytest.raises(TransferFailed, match=r"rank 0 of the trainers, is gone"):
        reader.result(30)


def test_members_that_do_not_join_are_named() -> None:
    members = Members("gloo", seconds=0.3)
    first = members.run(receive, 1)
    with pytest.raises(
        TransferFailed, match=r"timed out after 0\.3 s waiting for all members to join; missing: "
    ):
        members.run(send, 0).result(30)
    with pytest.raises(TransferFailed, match="engine 2"):
        first.result(30)


class Hung:
    """Stands for NCCL's group: its first broadcast blocks until every member has called it."""

    def __init__(self, barrier: threading.Event) -> None:
        self.barrier = barrier

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        self.barrier.wait(60)


def test_a_broadcast_that_never_connects_has_a_deadline_and_names_who_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engine 2's second worker has joined, and dies before it calls NCCL."""
    never = threading.Event()
    monkeypatch.setattr(transfer_group_module, "_group", lambda *_: Hung(never))
    members = Members("gloo", seconds=1.0)
    others = [members.run(receive, rank) for rank in (1, 2)]
    silent = members.run(lambda link: never.wait(10), 3)
    started = time.monotonic()
    with pytest.raises(TransferFailed) as failed:
        members.run(send, 0).result(30)
    assert time.monotonic() - started < 10
    assert "timed out after 1 s waiting for the members to connect" in str(failed.value)
    assert "not begun: engine 2;" in str(failed.value)
    assert "not connected: engine 0, engine 2" in str(failed.value)
    for other in others:
        with pytest.raises(TransferFailed, match="waiting for the members to connect"):
            other.result(30)
    never.set()
    silent.result(30)


def test_a_buffer_without_reader_has_a_deadline() -> None:
    members = Members("ipc", seconds=0.3)
    with pytest.raises(
        TransferFailed, match=r"timed out after 0\.3 s waiting for bucket 0 to be read on node"
    ):
        members.run(send, 0).result(30)


def test_shared_memory_is_freed_with_its_owner() -> None:
    buffer = SharedBuffer(8, CPU)
    seen = attach(buffer.handle, CPU, 8)
    buffer.flat.fill_(7)
    assert seen.tolist() == [7] * 8
    handle = buffer.handle
    del buffer
    assert seen.tolist() == [7] * 8, "an existing mapping stays valid"
    with pytest.raises(OSError):
        attach(handle, CPU, 8)
