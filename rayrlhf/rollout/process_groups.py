"""Process groups of an engine whose only rank is this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed


@contextmanager
def groups_of_one_rank_are_shared() -> Iterator[None]:
    """Inside, `torch.distributed.new_group` gives the same group for the same single rank and backend.

    vLLM makes 13 of them, also for a world of one rank: two per kind of parallelism. A thread of each gloo
    group looks for data every 10 ms as long as the process lives; 1,400 wake-ups a second interrupt the
    threads of trainers and engines on the same cores. Collectives of one rank do nothing, so that one group
    serves all.
    """
    original = torch.distributed.new_group
    shared: dict[tuple[int, str | None], Any] = {}

    def new_group(
        ranks: Sequence[int] | None = None, timeout: Any = None, backend: str | None = None, **options: Any
    ) -> Any:
        if ranks is None or len(ranks) != 1 or options or timeout is not None:
            return original(ranks, timeout=timeout, backend=backend, **options)
        key = (ranks[0], backend)
        if key not in shared:
            shared[key] = original(ranks, backend=backend)
        return shared[key]

    torch.distributed.new_group = new_group
    try:
        yield
    finally:
        torch.distributed.new_group = original
