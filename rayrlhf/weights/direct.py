"""The trainers' end of a direct push: one request invites all engines, then buckets go over the links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import torch
from torch import Tensor

from rayrlhf.weights.buckets import Group, fill, size_of
from rayrlhf.weights.failures import MeetingEnded
from rayrlhf.weights.shared_memory import device_key
from rayrlhf.weights.store import TensorSlice
from rayrlhf.weights.transfer_group import Backend, Delivery, Guest, Link, Meeting, join
from rayrlhf.weights.transfer_store import LOOPBACK, TransferStore

Answers = list[dict[str, Any]]
LOOK_SECONDS = 2.0  # how soon a dead engine is noticed where its connection does not tell
MOST_FAILURES = 2  # in a row, before the object store takes over for good


class Courier:
    """Every method is collective. A failure is told, never raised: the object store carries the push then."""

    def __init__(
        self,
        backend: Backend,
        tell_engines: Callable[..., Answers],
        *,
        rank: int,
        device: torch.device,
        gather: Callable[[list[Any]], list[Any]],
        timeout_seconds: float,
    ) -> None:
        """`tell_engines(what, method, *arguments)` asks all running ones; `gather` joins the ranks' lists."""
        self.backend: Backend = backend
        self.tell_engines = tell_engines
        self.rank = rank
        self.device = device
        self.gather = gather
        self.timeout_seconds = timeout_seconds
        self.key = device_key(device)
        places: list[tuple[str, str]] = gather([(self.key, node_id())])
        devices = [device for device, _ in places]
        self.devices = set(devices)
        self.nodes = {node for _, node in places} if backend == "ipc" else {places[0][1]}  # that join
        self.sends = rank == 0 if backend != "ipc" else devices.index(self.key) == rank
        self.link: Link | None = None
        self.meeting: Meeting | None = None
        self.store: TransferStore | None = None
        self.refused = 0  # strangers at the stores before this one
        self.failures = 0
        self.delivery: Delivery | None = None
        self.problem: str | None = None
        self.answers: Future[Answers] | None = None
        self.requests = ThreadPoolExecutor(2, thread_name_prefix="courier")
        self.arrived = threading.Event()

    def start(self, number: int, version: int, buckets: Sequence[Sequence[TensorSlice]]) -> bool:
        """Invite the engines; returns whether this push goes straight to all that run."""
        delivery: Delivery | None = None
        everybody, problem = False, None
        if self.rank == 0 and self.failures < MOST_FAILURES:
            try:
                guests, everybody = self._guests()
                if guests:
                    delivery = Delivery(self._meeting(guests), number, version, tuple(map(tuple, buckets)))
            except (TimeoutError, MeetingEnded) as error:
                problem = str(error)
        [(delivery, everybody, problem), *_] = self.gather([(delivery, everybody, problem)])
        self.problem = problem
        self.delivery = delivery
        if delivery is None:
            return False
        if self.rank == 0:
            self.arrived.clear()
            self.answers = self.requests.submit(self._deliver, delivery)
            assert self.store is not None
            self.requests.submit(self._look_after, delivery.meeting, self.store)
        if delivery.meeting != self.meeting:
            self.link, self.meeting = None, delivery.meeting
        if self.link is None and self._has_readers(delivery.meeting):
            self._try(self._join, delivery.meeting)
        return everybody

    def send(self, group: Group, slices: Sequence[TensorSlice]) -> Tensor | None:
        """The bucket, on its way, for whoever wants a copy; None where nothing was sent from here."""
        if self.delivery is None or self.link is None or self.problem is not None:
            return None
        flat = self.link.buffer(size_of(slices))
        fill(flat, group, slices)
        self._try(self.link.send, flat)
        return flat

    def finish(self) -> str | None:
        """Wait until all has arrived; why it has not, on every rank."""
        if self.link is not None and self.problem is None:
            self._try(self.link.flush)
        if self.answers is not None:
            try:
                self.answers.result(self.timeout_seconds)
            except Exception as error:
                self.problem = self.problem or str(error)
            self.arrived.set()
            self.answers = None
        self.problem = next(filter(None, self.gather([self.problem])), None)
        if self.problem or self.delivery is not None:
            self.failures = self.failures + 1 if self.problem else 0
        if self.problem:
            self._leave(self.problem)
        return self.problem

    def strangers(self) -> int:
        """Connections that were refused at this rank's stores, over the run."""
        return self.refused + (self.store.refused if self.store is not None else 0)

    def close(self) -> None:
        self.arrived.set()
        self._leave("the trainers have ended")
        self.requests.shutdown(wait=False, cancel_futures=True)

    def _guests(self) -> tuple[dict[int, Guest], bool]:
        """The engines that run and can be reached this way, and whether those are all that run."""
        found = self.tell_engines("asking the engines where they are", "describe")
        guests = {a["replica"]: _guest(a) for a in sorted_by_replica(found)}
        reached = {
            replica: guest
            for replica, guest in guests.items()
            if self.backend != "ipc" or self.devices.issuperset(guest.devices)
        }
        return reached, reached == guests

    def _meeting(self, guests: dict[int, Guest]) -> Meeting:
        """The one before, if the same engines come."""
        if self.meeting is not None and self.meeting.guests == guests:
            return self.meeting
        self._leave("other engines are there now")
        nodes = self.nodes | {guest.node for guest in guests.values()}
        self.store = TransferStore(LOOPBACK if len(nodes) == 1 else ray.util.get_node_ip_address())
        return Meeting(self.backend, self.store.address, guests, self.timeout_seconds)

    def _has_readers(self, meeting: Meeting) -> bool:
        """Whether somebody takes what this rank sends."""
        return self.sends and (self.backend != "ipc" or bool(meeting.readers(self.key)))

    def _join(self, meeting: Meeting) -> None:
        self.link = join(meeting, rank=0, device=self.device, key=self.key)

    def _leave(self, why: str) -> None:
        if self.link is not None:
            self.link.end(why)
        if self.store is not None:
            self.refused += self.store.refused
            self.store.close()
        self.link = self.meeting = self.store = None

    def _deliver(self, delivery: Delivery) -> Answers:
        what = f"delivering version {delivery.version} by {self.backend}"
        return self.tell_engines(what, "receive", delivery)

    def _look_after(self, meeting: Meeting, store: TransferStore) -> None:
        """End the meeting when a guest dies: some links would not tell before their deadline."""
        while not self.arrived.wait(LOOK_SECONDS):
            try:
                found = self.tell_engines("looking for the engines", "describe")
            except TimeoutError:  # alive, but slow: its link has a deadline of its own
                continue
            there = {answer["replica"]: answer["engine_pid"] for answer in found}
            gone = [replica for replica, guest in meeting.guests.items() if there.get(replica) != guest.pid]
            if gone:
                store.end(f"engine {gone[0]} died")
                return

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except MeetingEnded as ended:
            self.problem = str(ended)
            if self.link is not None:  # at once: it frees those who still wait for more
                self.link.end(self.problem)
                self.link = None


def node_id() -> str:
    """Ray's, of this process."""
    return ray.get_runtime_context().get_node_id()


def _guest(answer: dict[str, Any]) -> Guest:
    return Guest(answer["engine_pid"], tuple(answer["devices"]), answer["node"])


def sorted_by_replica(answers: Answers) -> Answers:
    return sorted(answers, key=lambda answer: answer["replica"])
