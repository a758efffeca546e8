"""Samples into balanced, packed mini-batches, in one process and as several ranks would do it together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.observe.metric_keys import METRICS
from rayrlhf.policy import batches as share
from rayrlhf.policy.batches import MiniBatch, Shared, share_out
from rayrlhf.samples import Sample
from tests.samples import make_prompt, make_sample


def numbered(lengths: Sequence[int]) -> list[Sample]:
    """One-token prompts, and responses of which each token names its sample."""
    return [
        make_sample([100 + i] * (length - 1), prompt=make_prompt([7]), group_id=i, score=float(i))
        for i, length in enumerate(lengths)
    ]


def members(batches: MiniBatch) -> list[list[int]]:
    """The numbers of the samples in each micro-batch; none for one that weighs nothing."""
    found = []
    for batch in batches:
        assert batch.group_ids is not None
        found.append([group for group in batch.group_ids.tolist() if group >= 0])
    return found


def made(lengths: Sequence[int], parts: int, budget: int, *, seed: int = 0, step: int = 0) -> Shared:
    return share_out(
        numbered(lengths),
        num_mini_batches=parts,
        full_batch=max(1, len(lengths)),
        budget_tokens=budget,
        seed=seed,
        step=step,
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=5, max_size=20),
    parts=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_every_sample_once_and_never_over_the_budget(lengths: list[int], parts: int, seed: int) -> None:
    shared = made(lengths, parts, 15, seed=seed, step=3)
    assert len(shared.mini_batches) == shared.metrics["data/mini_batches"] == parts
    found = [members(batches) for batches in shared.mini_batches]
    assert sorted(i for batches in found for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(map(len, batches)) for batches in found]
    assert max(sizes) - min(sizes) <= 1
    for batch in (batch for batches in shared.mini_batches for batch in batches):
        assert batch.num_tokens <= 15
        assert batch.scores is not None and batch.group_ids is not None
        for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            number = int(batch.group_ids[i])
            if number >= 0:
                assert batch.input_ids[start:end].tolist() == [7] + [100 + number] * (lengths[number] - 1)
                assert batch.scores[i] == number
    again = made(lengths, parts, 15, seed=seed, step=3)
    assert [members(batches) for batches in again.mini_batches] == found, "the same after a restart"
    assert set(shared.metrics) <= set(METRICS)
    assert shared.metrics["data/tokens"] == sum(lengths) and shared.metrics["data/samples"] == len(lengths)


def test_the_mini_batches_change_with_seed_and_step() -> None:
    def first(seed: int, step: int) -> list[list[int]]:
        return members(made([2] * 30, 2, 100, seed=seed, step=step).mini_batches[0])

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1) and first(0, 0) != first(1, 0)


def test_a_sample_over_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="9 tokens, more than the micro-batch budget of 8"):
        made([9], 1, 8)


def test_ranks_with_less_to_do_fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share.collectives, "max_over_ranks", lambda count: max(count, 3))
    shared = made([8, 8, 8], 2, 10)
    assert [[len(batch) for batch in members(batches)] for batches in shared.mini_batches] == [
        [1, 1, 0],
        [1, 0, 0],
    ]
    assert all(
        not batch.loss_mask.any() for batch in (shared.mini_batches[0][2], *shared.mini_batches[1][1:])
    )
    assert shared.metrics["data/filler_fraction"] == 0.5
    assert shared.metrics["data/fill"] == 0.8  # 24 tokens in three micro-batches of 10


def test_without_samples_there_is_still_a_micro_batch() -> None:
    assert [members(batches) for batches in made([], 2, 10).mini_batches] == [[[]]]


@pytest.mark.parametrize(
    ("num_samples", "sizes"),
    [
        (64, [8] * 8),  # a full batch
        (63, [8] * 7 + [7]),
        (16, [8, 8]),  # two groups of eight have been kept
        (9, [5, 4]),  # never more than 8 in one
        (5, [5]),  # at 8 mini-batches, 3 had been empty
        (1, [1]),
    ],
)
def test_11_fewer_samples_make_up_fewer_mini_batches(num_samples: int, sizes: list[int]) -> None:
    shared = share_out(
        numbered([3] * num_samples), num_mini_batches=8, full_batch=64, budget_tokens=64, seed=0, step=0
    )
    assert [sum(map(len, members(batches))) for batches in shared.mini_batches] == sizes
    assert shared.metrics["data/mini_batches"] == len(sizes)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 40))
def test_11_no_mini_batch_is_empty_or_over_its_size(full: int, parts: int, num_samples: int) -> None:
    parts, num_samples = min(parts, full), min(num_samples, full)
    shared = share_out(
        numbered([2] * num_samples),
        num_mini_batches=parts,
        full_batch=full,
        budget_tokens=64,
        seed=0,
        step=0,
    )
    sizes = [sum(map(len, members(batches))) for batches in shared.mini_batches]
    assert sum(sizes) == num_samples and len(sizes) <= parts
    assert all(1 <= size <= -(-full // parts) for size in sizes) or num_samples == 0


class Ranks:
    """Plays one rank of several whose samples are known; what the others send is worked out alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, by_rank: Sequence[Sequence[Sample]]) -> None:
        self.by_rank = by_rank
        self.sent: dict[int, list[list[Sample]]] = {}
        patch = monkeypatch.setattr
        patch(share.collectives, "world_size", lambda: len(by_rank))
        patch(share.collectives, "gather_lists", self._gather)
        patch(share.collectives, "exchange", self._exchange)
        self.rank = 0

    def _gather(self, _mine: object) -> list[list[tuple[tuple[int, int], int]]]:
        return [[((s.group_id, s.sample_index), s.num_tokens) for s in samples] for samples in self.by_rank]

    def _exchange(self, outgoing: list[list[Sample]]) -> list[Sample]:
        self.sent[self.rank] = outgoing
        return [sample for sender in sorted(self.sent) for sample in self.sent[sender][self.rank]]

    def share(self, parts: int) -> list[list[list[list[int]]]]:
        """Per rank, mini-batch and micro-batch: sample numbers. Two rounds: in the first all have sent."""
        found: list[list[list[list[int]]]] = []
        for _ in range(2):
            found = []
            for rank, samples in enumerate(self.by_rank):
                self.rank = rank
                shared = share_out(
                    samples, num_mini_batches=parts, full_batch=12, budget_tokens=64, seed=0, step=0
                )
                found.append([members(batches) for batches in shared.mini_batches])
                self.metrics = shared.metrics
        return found


def test_ranks_get_equal_work_and_the_mini_batches_of_a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [40, 38, 4, 5, 6, 30, 28, 3, 2, 33, 31, 7]
    alone = made(lengths, 2, 64)
    one_rank = [sorted(i for batch in members(batches) for i in batch) for batches in alone.mini_batches]
    samples = numbered(lengths)
    ranks = Ranks(monkeypatch, [samples[:2], samples[2:]])  # the first has collected two, the other ten
    found = ranks.share(parts=2)
    together = [sorted(i for rank in found for batch in rank[part] for i in batch) for part in range(2)]
    assert together == one_rank
    work = [sum(lengths[i] for part in rank for batch in part for i in batch) for rank in found]
    assert max(work) <= 1.1 * min(work)
    assert ranks.metrics["data/imbalance"] < 0.05 < ranks.metrics["data/imbalance_before"]
