"""This rank's prompts in the order of the run, and how far it has come."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from rayrlhf.policy.rollouts import Numbered
from rayrlhf.samples import Prompt


class PromptQueue:
    """Numbers the prompts of a stream of draws. A draw is `rollout.prompts_per_step` prompts over all ranks.

    A prompt's number, its group id, is its place in the run's stream: the same for any number of workers.
    Prompts that were taken and not reported by `finish` when a checkpoint is written are taken first after a
    resume.
    """

    def __init__(self, *, rank: int, per_rank: int, prompts_per_draw: int) -> None:
        self.rank = rank
        self.per_rank = per_rank
        self.prompts_per_draw = prompts_per_draw
        self.next_draw = 0  # the first that this rank has not fetched
        self._stream: Iterator[tuple[int, list[Prompt]]] = iter(())
        self._waiting: deque[Numbered] = deque()
        self._unfinished: dict[int, Prompt] = {}
        self._done: set[int] = set()  # prompts of draws to come that another number of workers has finished

    def connect(self, stream: Iterator[tuple[int, list[Prompt]]]) -> None:
        """Feed the queue from (draw, this rank's prompts), which may begin before where this rank stands."""
        self._stream = stream

    def take(self, count: int) -> list[Numbered]:
        """The next prompts of this rank."""
        while len(self._waiting) < count:
            self._fetch_draw()
        taken = [self._waiting.popleft() for _ in range(count)]
        self._unfinished |= dict(taken)
        return taken

    def put_back(self, prompts: Sequence[Numbered]) -> None:
        """Prompts to be taken again, before all others."""
        self.finish(group_id for group_id, _ in prompts)
        self._waiting.extendleft(reversed(prompts))

    def finish(self, group_ids: Iterable[int]) -> None:
        """These prompts have done their work: their samples are trained on or dropped."""
        for group_id in group_ids:
            self._unfinished.pop(group_id, None)

    def _fetch_draw(self) -> None:
        draw, prompts = next(self._stream, (-1, []))
        assert draw >= 0, "the stream of prompts is over: its plan has fewer draws than the run needs"
        if draw < self.next_draw:
            return  # another rank needs it; this one has it behind it, or in its checkpoint
        first = draw * self.prompts_per_draw + self.rank * self.per_rank
        self._waiting.extend(
            (group_id, prompt)
            for group_id, prompt in enumerate(prompts, start=first)
            if group_id not in self._done
        )
        self.next_draw = draw + 1

    def save(self, folder: Path) -> None:
        prompts = [
            {
                "group_id": group_id,
                "row_id": prompt.row_id,
                "prompt_ids": prompt.prompt_ids,
                "prompt": prompt.prompt,
                "columns": prompt.columns,
            }
            for group_id, prompt in [*self._unfinished.items(), *self._waiting]
        ]
        saved = {"per_rank": self.per_rank, "next_draw": self.next_draw, "prompts": prompts}
        _file(folder, self.rank).write_text(json.dumps(saved))

    def load(self, folder: Path) -> None:
        """Also what another number of workers has saved, who are dealt out anew."""
        saved = [_read(file) for file in _files(folder)]
        if saved[0].per_rank == self.per_rank:
            self.next_draw = saved[self.rank].next_draw
            self._waiting = deque(saved[self.rank].prompts)
            return
        # What some rank had not fetched is fetched again, but for those prompts that are done already.
        self.next_draw = min(part.next_draw for part in saved)
        refetched = self.next_draw * self.prompts_per_draw
        everything = sorted((numbered for part in saved for numbered in part.prompts), key=itemgetter(0))
        self._waiting = deque(
            (group_id, prompt)
            for group_id, prompt in everything
            if group_id < refetched and self._is_mine(group_id)
        )
        self._done = {
            group_id
            for rank, part in enumerate(saved)
            for group_id in range(refetched, part.next_draw * self.prompts_per_draw)
            if group_id % self.prompts_per_draw // part.per_rank == rank
        } - {group_id for group_id, _ in everything}

    def _is_mine(self, group_id: int) -> bool:
        return group_id % self.prompts_per_draw // self.per_rank == self.rank


@dataclass(frozen=True)
class _Part:
    """What one rank has saved."""

    per_rank: int
    next_draw: int
    prompts: list[Numbered]


def _read(file: Path) -> _Part:
    saved = json.loads(file.read_text())
    prompts = [(row.pop("group_id"), Prompt(**row)) for row in saved["prompts"]]
    return _Part(saved["per_rank"], saved["next_draw"], prompts)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"prompts-rank-{rank:04d}.json"


def _files(folder: Path) -> list[Path]:
    """Of all ranks, in their order."""
    return sorted(folder.glob("prompts-rank-*.json"))
