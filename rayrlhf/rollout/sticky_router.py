"""Serve's router of multi-turn rollouts: turns of an episode go to the engine that cached their prefix."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

MAX_SESSIONS = 100_000  # of the latest episodes; those of one process are far fewer


class StickyRouter(RequestRouter):
    """The replica with the shorter queue of two random ones, for requests without a session and for the
    first of each; the others of a session go where it went, while that replica lives.

    Serve's own `ConsistentHashRouter` takes replicas by hash, whatever their queues are: of 512 sessions over
    8 replicas the fullest then has about 80 instead of 64.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._replica_of: OrderedDict[str, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        session = "" if pending_request is None else pending_request.metadata.session_id
        known = self._replica_of.get(session)
        if known is not None and known in self._replicas:
            assert pending_request is not None
            pending_request.routing_context.should_backoff = True  # it may be full: ask it again, not at once
            return [[self._replicas[known]]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        session = pending_request.metadata.session_id
        if session:
            self._replica_of[session] = replica_id
            self._replica_of.move_to_end(session)
            if len(self._replica_of) > MAX_SESSIONS:
                self._replica_of.popitem(last=False)
