"""Random number generators of ranks, and that resuming continues them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from rayrlhf.train.checkpoint import STATE_FILE, LoopState
from rayrlhf.train.random_states import RandomStates
from rayrlhf.train.safe_load import unsafe_files


def sample_numbers() -> tuple[list[float], float, float]:
    return torch.rand(4).tolist(), random.random(), float(np.random.normal())


def states(*, rank: int = 0, world_size: int = 2, seed: int = 7) -> RandomStates:
    return RandomStates(seed, rank=rank, world_size=world_size)


def leave(folder: Path, own: RandomStates, step: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    (folder / STATE_FILE).write_text(json.dumps(asdict(LoopState(step=step))))
    own.save(folder)


def test_17_ranks_drop_other_places() -> None:
    states(rank=0)
    first = sample_numbers()
    states(rank=1)
    second = sample_numbers()
    assert all(one != other for one, other in zip(first, second, strict=True))
    states(rank=0)
    assert sample_numbers() == first
    states(rank=0, seed=8)
    assert sample_numbers()[0] != first[0]


def test_17_a_checkpoint_goes_on_with_the_numbers_that_come_next(tmp_path: Path) -> None:
    own = states()
    sample_numbers()
    np.random.normal()  # of which NumPy makes two and keeps one
    leave(tmp_path, own)
    expected = [sample_numbers(), sample_numbers()]
    again = states()
    assert sample_numbers() != expected[0]
    again.load(tmp_path)
    assert [sample_numbers(), sample_numbers()] == expected


def test_17_of_another_number_of_ranks_each_begins_at_the_step(tmp_path: Path) -> None:
    for rank in range(2):
        leave(tmp_path, states(rank=rank))
    found = []
    for rank in range(3):
        states(rank=rank, world_size=3).load(tmp_path)
        found.append(sample_numbers()[0])
    assert len(set(map(tuple, found))) == 3
    states(rank=0, world_size=3)
    assert sample_numbers()[0] != found[0]  # those of step 0


def test_17_a_checkpoint_without_states_begins_at_its_step(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps(asdict(LoopState(step=5))))
    states().load(tmp_path)
    found = sample_numbers()
    states().load(tmp_path)
    assert sample_numbers() == found
    states()
    assert sample_numbers() != found


def test_17_the_states_are_tensors_and_plain_values(tmp_path: Path) -> None:
    leave(tmp_path, states())
    files = sorted(tmp_path.rglob("*.pt"))
    assert [file.name for file in files] == ["rank_0000.pt"] and unsafe_files(files) == []
