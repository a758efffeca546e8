"""What engines and trainers agree by: the newest weights, and whose turn it is.

Without torch: the hub's own process and the replicas in front of the engines do not need it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from ray import ObjectRef

MAX_EVENTS = 10_000
Part = Literal["weights", "kv_cache"]  # of an engine's memory


@dataclass(frozen=True)
class TensorSlice:
    """Where one weight lies in a bucket."""

    name: str  # as in the Hugging Face checkpoint
    dtype: str  # as in torch, e.g. "float32"
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


Bucket = tuple[list[TensorSlice], ObjectRef]


@dataclass(frozen=True)
class Event:
    """Something in the change of turns, by the hub's clock."""

    seconds: float
    who: str
    what: str


@dataclass(frozen=True)
class Publication:
    number: int  # counts publications: unlike the version, it never goes back
    version: int  # of the policy; without buckets it is that of the checkpoint which engines load
    buckets: list[Bucket]


class WeightHub:
    """A small actor of the run that knows the newest version and keeps its buckets alive.

    Where engines and trainers have their memory by turns, it also knows whose turn it is.
    """

    def __init__(self, *, checkpoint_version: int = 0) -> None:
        """`checkpoint_version`: -1 where the checkpoint is not yet the policy, whose version 0 is to come."""
        self.newest_publication = Publication(0, checkpoint_version, [])
        # Number and version of the publication that is being made, or of the newest.
        self.announced = (-checkpoint_version, 0)
        self.engines_turn = True
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def announce(self, version: int) -> int:
        """The number of the publication that is to come. A lower version than before comes from a trainer
        that was restarted from its last checkpoint.
        """
        self.announced = (self.announced[0] + 1, version)
        return self.announced[0]

    def publish(self, publication: Publication) -> None:
        self.newest_publication = publication

    def is_coming(self, version: int) -> bool:
        """Whether a publication of at least that version has been announced and is not here yet."""
        number, announced = self.announced
        return announced >= version and number > self.newest_publication.number

    def newest(self) -> Publication:
        return self.newest_publication

    def set_turn(self, engines: bool) -> None:
        self.engines_turn = engines

    def is_engines_turn(self) -> bool:
        return self.engines_turn

    def record(self, who: str, what: str) -> None:
        self.events.append(Event(time.time(), who, what))

    def trace(self) -> list[Event]:
        """The newest events, in the order in which they arrived."""
        return list(self.events)
