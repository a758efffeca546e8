"""Links between a trainer and engines, each member a thread here; with processes: tests/integration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.weights.failures import MeetingEnded
from rayrlhf.weights.shared_memory import SharedBuffer, attach
from rayrlhf.weights.transfer_group import Backend, Guest, Link, Meeting, end_meeting, join
from rayrlhf.weights.transfer_store import Address, TransferStore

CPU = torch.device("cpu")
SIZES = [1000, 1, 70_000, 16]
GUESTS = {0: Guest(10, ("node",)), 2: Guest(12, ("node", "node"))}  # engine 1 is not there


def bucket(index: int) -> Tensor:
    return (torch.arange(SIZES[index]) % 251 + index).to(torch.uint8)


@pytest.fixture(autouse=True)
def stores() -> Iterator[list[TransferStore]]:
    """Closes what a test has opened."""
    yield OPENED
    while OPENED:
        OPENED.pop().close()


OPENED: list[TransferStore] = []


class Party:
    """The trainer and every worker of the engines."""

    def __init__(self, backend: Backend, *, seconds: float = 20.0) -> None:
        self.store = TransferStore()
        OPENED.append(self.store)
        self.meeting = Meeting(backend, self.store.address, GUESTS, seconds)
        self.pool = ThreadPoolExecutor(self.meeting.size)

    def run(self, member: Callable[[Link], Any], rank: int) -> Future[Any]:
        def attend() -> Any:
            link = join(self.meeting, rank=rank, device=CPU, key="node")
            try:
                return member(link)
            except MeetingEnded as ended:
                link.end(str(ended))  # as engines and trainers do: gloo's group would wait where it is let go
                raise

        return self.pool.submit(attend)


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


def test_ranks_at_a_meeting() -> None:
    meeting = Meeting("gloo", Address("tcp://host:1", b"", b"", b""), GUESTS, 1.0)
    assert meeting.size == 4
    assert (meeting.first_rank(0), meeting.first_rank(2)) == (1, 2)
    assert meeting.readers("node") == [1, 2, 3] and meeting.readers("elsewhere") == []


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_every_worker_gets_every_byte_push_after_push(backend: Backend) -> None:
    party = Party(backend)
    sender = party.run(lambda link: send(link, pushes=2), 0)
    receivers = [party.run(lambda link: receive(link, pushes=2), rank) for rank in (1, 2, 3)]
    sender.result(30)
    for receiver in receivers:
        for index, got in enumerate(receiver.result(30)):
            assert torch.equal(got, bucket(index % len(SIZES)))


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_one_that_gives_up_frees_the_others_at_once(backend: Backend) -> None:
    def gives_up(link: Link) -> None:
        link.receive(SIZES[0])
        link.release()
        link.end("engine 2: out of memory")

    party = Party(backend)
    started = time.monotonic()
    members = [party.run(send, 0), *(party.run(receive, rank) for rank in (1, 2)), party.run(gives_up, 3)]
    members[3].result(30)
    for member in members[:3] if backend == "gloo" else members[:1]:  # a reader may have everything already
        with pytest.raises(MeetingEnded, match=r"engine 2: out of memory|a broadcast failed"):
            member.result(30)
    assert time.monotonic() - started < 10, "long before the deadline of 20 s"


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_one_that_never_came_can_say_why(backend: Backend) -> None:
    party = Party(backend)
    sender = party.run(send, 0)
    end_meeting(party.meeting, "engine 2: asleep")
    with pytest.raises(MeetingEnded, match="engine 2: asleep"):
        sender.result(30)
    party.store.close()
    end_meeting(party.meeting, "too late")  # nobody is there any more


def test_a_meeting_ends_with_its_host() -> None:
    party = Party("ipc")
    reader = party.run(lambda link: link.receive(10), 1)
    time.sleep(0.5)
    party.store.close()
    with pytest.raises(MeetingEnded, match=r"rank 0 of the trainers, has gone"):
        reader.result(30)


def test_who_does_not_come_is_named() -> None:
    party = Party("gloo", seconds=0.3)
    first = party.run(receive, 1)
    with pytest.raises(MeetingEnded, match=r"the meeting .* did not happen within 0\.3 s; missing: "):
        party.run(send, 0).result(30)
    with pytest.raises(MeetingEnded, match="engine 2"):
        first.result(30)


def test_a_buffer_nobody_reads_has_a_deadline() -> None:
    party = Party("ipc", seconds=0.3)
    with pytest.raises(MeetingEnded, match=r"the reading of bucket 0 on node did not happen within 0\.3 s"):
        party.run(send, 0).result(30)


def test_shared_memory_goes_with_its_owner() -> None:
    buffer = SharedBuffer(8, CPU)
    seen = attach(buffer.handle, CPU, 8)
    buffer.flat.fill_(7)
    assert seen.tolist() == [7] * 8
    handle = buffer.handle
    del buffer
    assert seen.tolist() == [7] * 8, "who is reading goes on"
    with pytest.raises(OSError):
        attach(handle, CPU, 8)
