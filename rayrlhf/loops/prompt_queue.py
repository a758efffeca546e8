"""This rank's prompts in the order of the run, and how far it has come."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rayrlhf.batch import Prompt
from rayrlhf.loops.collect import Numbered


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
        self._waiting.extend(enumerate(prompts, start=first))
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
        self._file(folder).write_text(json.dumps({"next_draw": self.next_draw, "prompts": prompts}))

    def load(self, folder: Path) -> None:
        """Raises `FileNotFoundError` when the checkpoint is of a run with fewer workers."""
        saved = json.loads(self._file(folder).read_text())
        self.next_draw = saved["next_draw"]
        self._waiting = deque((row.pop("group_id"), Prompt(**row)) for row in saved["prompts"])

    def _file(self, folder: Path) -> Path:
        return folder / f"prompts-rank-{self.rank}.json"
