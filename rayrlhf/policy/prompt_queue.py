"""Queue of this rank's prompts in the order of the run, with a resumable position."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rayrlhf.samples import EncodedImage, Prompt

Numbered = tuple[int, Prompt]  # group id, prompt


class PromptQueue:
    """Numbers the prompts of a stream of prompt batches, `rollout.prompts_per_step` each over all ranks.

    A prompt's number, its group id, is its position in the run's stream, independent of the number of
    workers. Prompts that were taken but not reported by `finish` when a checkpoint is saved come first after
    resuming.
    """

    def __init__(self, *, rank: int, per_rank: int, prompts_per_batch: int) -> None:
        self.rank = rank
        self.per_rank = per_rank
        self.prompts_per_batch = prompts_per_batch
        self.next_batch = 0  # the first one that this rank has not fetched
        self._stream: Iterator[tuple[int, list[Prompt]]] = iter(())
        self._waiting: deque[Numbered] = deque()
        self._unfinished: dict[int, Prompt] = {}
        self._done: set[int] = (
            set()
        )  # of later prompt batches, finished before resuming with another number of workers

    def connect(self, stream: Iterator[tuple[int, list[Prompt]]]) -> None:
        """Set the source: (prompt batch number, this rank's prompts), which may start before `next_batch`."""
        self._stream = stream

    def take(self, count: int) -> list[Numbered]:
        """The next prompts of this rank."""
        while len(self._waiting) < count:
            self._fetch_batch()
        taken = [self._waiting.popleft() for _ in range(count)]
        self._unfinished |= dict(taken)
        return taken

    def put_back(self, prompts: Sequence[Numbered]) -> None:
        """Return prompts to the front of the queue."""
        self.finish(group_id for group_id, _ in prompts)
        self._waiting.extendleft(reversed(prompts))

    def finish(self, group_ids: Iterable[int]) -> None:
        """Mark prompts as finished: their samples were trained on or dropped."""
        for group_id in group_ids:
            self._unfinished.pop(group_id, None)

    def _fetch_batch(self) -> None:
        batch, prompts = next(self._stream, (-1, []))
        assert batch >= 0, "the stream of prompts has ended: its plan has fewer batches than the run needs"
        if batch < self.next_batch:
            return  # needed by another rank; this rank has finished it, or has it in its checkpoint
        first = batch * self.prompts_per_batch + self.rank * self.per_rank
        self._waiting.extend(
            (group_id, prompt)
            for group_id, prompt in enumerate(prompts, start=first)
            if group_id not in self._done
        )
        self.next_batch = batch + 1

    def save(self, folder: Path) -> None:
        prompts = [
            {
                "group_id": group_id,
                "row_id": prompt.row_id,
                "prompt_ids": prompt.prompt_ids,
                "prompt": prompt.prompt,
                "columns": prompt.columns,
                "images": [[b64encode(i.content).decode(), i.num_tokens] for i in prompt.images],
            }
            for group_id, prompt in [*self._unfinished.items(), *self._waiting]
        ]
        saved = {"per_rank": self.per_rank, "next_batch": self.next_batch, "prompts": prompts}
        _file(folder, self.rank).write_text(json.dumps(saved))

    def load(self, folder: Path) -> None:
        """Load the queue. If another number of workers saved it, the prompts are redistributed."""
        saved = [_read(file) for file in _files(folder)]
        if saved[0].per_rank == self.per_rank:
            self.next_batch = saved[self.rank].next_batch
            self._waiting = deque(saved[self.rank].prompts)
            return
        # Batches that some rank had not fetched are fetched again, except for prompts that are done.
        self.next_batch = min(part.next_batch for part in saved)
        refetched = self.next_batch * self.prompts_per_batch
        everything = sorted((numbered for part in saved for numbered in part.prompts), key=itemgetter(0))
        self._waiting = deque(
            (group_id, prompt)
            for group_id, prompt in everything
            if group_id < refetched and self._is_mine(group_id)
        )
        self._done = {
            group_id
            for rank, part in enumerate(saved)
            for group_id in range(refetched, part.next_batch * self.prompts_per_batch)
            if group_id % self.prompts_per_batch // part.per_rank == rank
        } - {group_id for group_id, _ in everything}

    def _is_mine(self, group_id: int) -> bool:
        return group_id % self.prompts_per_batch // self.per_rank == self.rank


@dataclass(frozen=True)
class _Part:
    """The queue that one rank has saved."""

    per_rank: int
    next_batch: int
    prompts: list[Numbered]


def _read(file: Path) -> _Part:
    saved = json.loads(file.read_text())
    prompts = [(row.pop("group_id"), _prompt(row)) for row in saved["prompts"]]
    # `next_draw` is the name of `next_batch` in checkpoints made before November 2026.
    next_batch = saved["next_batch"] if "next_batch" in saved else saved["next_draw"]
    return _Part(saved["per_rank"], next_batch, prompts)


def _prompt(row: dict[str, Any]) -> Prompt:
    images = row.pop("images", ())  # missing in checkpoints made before December 2026
    return Prompt(**row, images=tuple(EncodedImage(b64decode(text), count) for text, count in images))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"prompts-rank-{rank:04d}.json"


def _files(folder: Path) -> list[Path]:
    """The files of all ranks, in rank order."""
    return sorted(folder.glob("prompts-rank-*.json"))
