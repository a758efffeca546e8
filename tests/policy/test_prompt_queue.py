"""Prompts in the order of the run, over checkpoints and for any number of ranks."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.samples import EncodedImage, Prompt
from tests.samples import make_prompt


def stream(rank: int, per_rank: int, world_size: int, start: int = 0) -> Iterator[tuple[int, list[Prompt]]]:
    """Five prompt batches; a prompt's row id is its place in the stream."""
    for batch in range(start, 5):
        first = batch * per_rank * world_size + rank * per_rank
        yield batch, [make_prompt(row_id=first + i, topic=f"t{first + i}") for i in range(per_rank)]


def queue(rank: int = 0, per_rank: int = 2, world_size: int = 2, start: int = 0) -> PromptQueue:
    made = PromptQueue(rank=rank, per_rank=per_rank, prompts_per_batch=per_rank * world_size)
    made.connect(stream(rank, per_rank, world_size, start))
    return made


def ids(numbered: list[tuple[int, Prompt]]) -> list[int]:
    assert all(group_id == prompt.row_id for group_id, prompt in numbered)
    return [group_id for group_id, _ in numbered]


def test_group_ids_are_places_in_the_stream() -> None:
    assert ids(queue(rank=0).take(4)) == [0, 1, 4, 5]
    assert ids(queue(rank=1).take(3)) == [2, 3, 6]
    assert ids(queue(rank=0, per_rank=4, world_size=1).take(8)) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_put_back_comes_first() -> None:
    prompts = queue()
    first = prompts.take(3)
    prompts.put_back(first[:2])
    assert ids(prompts.take(4)) == [0, 1, 5, 8]


def test_a_checkpoint_brings_back_what_was_not_finished(tmp_path: Path) -> None:
    prompts = queue()
    taken = ids(prompts.take(5))
    prompts.finish(taken[:2])
    prompts.save(tmp_path)
    assert prompts.next_batch == 3
    resumed = PromptQueue(rank=0, per_rank=2, prompts_per_batch=4)
    resumed.load(tmp_path)
    resumed.connect(stream(0, 2, 2, start=1))  # another rank is not as far: the stream begins earlier
    again = resumed.take(6)
    assert ids(again) == [4, 5, 8, 9, 12, 13]
    assert again[0][1].columns == {"topic": "t4"}


def test_a_checkpoint_keeps_the_images_of_prompts(tmp_path: Path) -> None:
    image = EncodedImage(b"\x89PNG", 4)
    prompts = PromptQueue(rank=0, per_rank=1, prompts_per_batch=1)
    prompts.connect(iter([(0, [Prompt(0, [1, 2], "", images=(image,))])]))
    prompts.take(1)
    prompts.save(tmp_path)
    resumed = PromptQueue(rank=0, per_rank=1, prompts_per_batch=1)
    resumed.load(tmp_path)
    [(_, prompt)] = resumed.take(1)
    assert prompt.images == (image,)


def test_a_checkpoint_made_before_batches_were_called_so_still_loads(tmp_path: Path) -> None:
    """As rayrlhf 0.1 has written it: `next_draw`."""
    old = {
        "per_rank": 2,
        "next_draw": 3,
        "prompts": [{"group_id": 4, "row_id": 4, "prompt_ids": [5, 6], "prompt": "ab", "columns": {}}],
    }
    (tmp_path / "prompts-rank-0000.json").write_text(json.dumps(old))
    resumed = PromptQueue(rank=0, per_rank=2, prompts_per_batch=4)
    resumed.load(tmp_path)
    assert resumed.next_batch == 3
    resumed.connect(stream(0, 2, 2))
    assert ids(resumed.take(3)) == [4, 12, 13]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    before=st.sampled_from([1, 2, 3, 6]),
    after=st.sampled_from([1, 2, 3, 6]),
    taken=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    finished=st.sets(st.integers(0, 29)),
)
def test_another_number_of_workers_loses_no_prompt_and_repeats_none(
    before: int, after: int, taken: list[int], finished: set[int]
) -> None:
    """30 prompts in batches of 6; ranks have come differently far, and finished what they liked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done: set[int] = set()
        queues = [queue(rank, 6 // before, before) for rank in range(before)]
        for prompts, count in zip(queues, taken, strict=False):
            mine = finished & set(ids(prompts.take(min(count, 5 * (6 // before)))))
            prompts.finish(mine)
            prompts.save(folder)
            done |= mine
        first_batch = min(prompts.next_batch for prompts in queues)
        again: list[int] = []
        for rank in range(after):
            resumed = PromptQueue(rank=rank, per_rank=6 // after, prompts_per_batch=6)
            resumed.load(folder)
            resumed.connect(stream(rank, 6 // after, after, start=first_batch))
            with contextlib.suppress(AssertionError):  # the stream is over
                while True:
                    again += ids(resumed.take(1))
    assert sorted(again) == sorted(set(range(30)) - done)


def test_a_stream_that_is_too_short_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="fewer batches than the run needs"):
        queue().take(11)
