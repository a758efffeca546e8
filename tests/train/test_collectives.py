"""Collectives of numbers and objects over real gloo groups of one, three and four ranks."""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from rayrlhf.algorithms.metrics import Max, Mean, Metrics, Sum
from rayrlhf.train import collectives
from rayrlhf.train.collectives import Ranks

SIZES = [1, 3, 4]


def results_of(rank: int, size: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=size, timeout=timedelta(60)
    )
    ranks = Ranks()
    tenths = torch.tensor([0.1 * (rank + 1), float(rank)], dtype=torch.float64)
    large = torch.full((collectives.RING_BYTES // 4,), float(rank + 1), dtype=torch.float32)
    metrics = Metrics(
        {"a": Max(float(rank)), "b": Mean(float(rank), 2.0), "c": Max(-1.0 - rank), "d": Sum(1.0)}
    )
    outgoing: list[list[Any]] = [[(rank, other)] * ((rank + other) % 3) for other in range(size)]
    result = {
        "sum": ranks.sum_tensor(tenths),
        "given": tenths,
        "large": ranks.sum_tensor(large)[:2].tolist(),
        "numbers": ranks.sum_numbers({"x": float(rank), "y": 1.0}),
        "max": ranks.max(float(rank)),
        "min": ranks.min(float(rank)),
        "nan": ranks.max(math.nan if rank == size - 1 else 0.0),
        "gathered": ranks.gather([f"{rank}{letter}" for letter in "ab"[: rank % 2 + 1]]),
        "of_rank_0": ranks.gather([b"x" * 50_000] if rank == 0 else []),
        "exchanged": ranks.exchange(outgoing),
        "nothing": ranks.exchange([[] for _ in range(size)]),
        "metrics": collectives.add_up(metrics).results(),
    }
    ranks.barrier()
    torch.save(result, f"{out}/{rank}")
    dist.destroy_process_group()


@lru_cache
def results(size: int, folder: str) -> list[dict[str, Any]]:
    spawn(results_of, (size, folder), nprocs=size)
    return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module", params=SIZES)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(request.param, str(tmp_path_factory.mktemp("ranks")))


def test_sums_and_extremes_are_over_all_ranks(every: list[dict[str, Any]]) -> None:
    last = len(every) - 1
    for rank, found in enumerate(every):
        assert found["sum"].tolist() == pytest.approx(
            [sum(0.1 * (r + 1) for r in range(last + 1)), sum(range(last + 1))]
        )
        assert found["given"].tolist() == [0.1 * (rank + 1), rank], "the argument is not changed"
        assert found["large"] == [(last + 1) * (last + 2) / 2] * 2, "by a ring"
        assert found["numbers"] == {"x": sum(range(last + 1)), "y": last + 1}
        assert (found["min"], found["max"]) == (0, last)
        assert math.isnan(found["nan"])
        assert found["metrics"] == {"a": last, "b": last / 4, "c": -1, "d": last + 1}


def test_sums_have_the_same_bits_on_every_rank(every: list[dict[str, Any]]) -> None:
    assert all(torch.equal(found["sum"], every[0]["sum"]) for found in every)


def test_lists_of_any_length_are_joined_in_the_order_of_ranks(every: list[dict[str, Any]]) -> None:
    wanted = [f"{rank}{letter}" for rank in range(len(every)) for letter in "ab"[: rank % 2 + 1]]
    for found in every:
        assert found["gathered"] == wanted
        assert found["of_rank_0"] == [b"x" * 50_000]


def test_every_rank_gets_what_is_meant_for_it(every: list[dict[str, Any]]) -> None:
    size = len(every)
    for rank, found in enumerate(every):
        assert found["exchanged"] == [
            (sender, rank) for sender in range(size) for _ in range((sender + rank) % 3)
        ]
        assert found["nothing"] == []


class Simulated:
    """512 ranks in threads; counts the messages that each sends."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = threading.local()
        self.sent = [0] * size
        self.boxes: dict[tuple[int, int], list[Any]] = {}
        self.arrived = threading.Condition()

    def swap(self, value: Any, other: int) -> Any:
        me = self.rank.value
        self.sent[me] += 1
        with self.arrived:
            self.boxes.setdefault((me, other), []).append(value)
            self.arrived.notify_all()
            self.arrived.wait_for(lambda: self.boxes.get((other, me)), 60)
            return self.boxes[other, me].pop(0)


@pytest.mark.parametrize(("size", "rounds"), [(512, 9), (500, 10)])
def test_at_512_ranks_a_reduction_takes_few_rounds(
    size: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Simulated(size)
    monkeypatch.setattr(collectives, "world_size", lambda: size)
    monkeypatch.setattr(collectives, "rank", lambda: ranks.rank.value)
    found: list[frozenset[int]] = [frozenset()] * size

    def run(rank: int) -> None:
        ranks.rank.value = rank
        found[rank] = collectives._combined(frozenset([rank]), frozenset.union, ranks.swap)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {frozenset(range(size))}
    assert max(ranks.sent) == rounds, "a ring takes 1,022"
