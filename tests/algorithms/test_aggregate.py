"""Aggregation: hand-derived shares, independence of packing, and garbage outside the mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.aggregate import aggregate, loss_sequences, sequence_counts, sequence_sums
from rayrlhf.algorithms.registry import AGGREGATIONS
from rayrlhf.batch import cu_seqlens_of

NAN, INF = math.nan, math.inf

# Four sequences: two ordinary ones (the second with a tool token), a padded row, and one policy token alone.
#                       |---- A ----|  |------- B -------|  |-- C --|  |- D -|
LOSS = torch.tensor([NAN, 1.0, 3.0, INF, 2.0, NAN, 6.0, 4.0, NAN, INF, 0.0, 10.0])
MASK = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
CU_SEQLENS = cu_seqlens_of([3, 5, 2, 2])
# sums:  A 1+3 = 4    B 2+6+4 = 12    C 0    D 10    -> 26
# counts: 2            3               0      1       -> 6 tokens in 3 sequences that learn
EXPECTED = {
    "token_mean": 26 / 6,
    "sequence_mean": (4 / 2 + 12 / 3 + 10 / 1) / 3,  # = 16/3
    "sequence_sum_norm": 26 / 8 / 3,  # constant length 8
}


def share(
    name: str, loss: Tensor, mask: Tensor, cu_seqlens: Tensor, tokens: float, sequences: float
) -> Tensor:
    return aggregate(
        name, loss, mask, cu_seqlens, global_tokens=tokens, global_sequences=sequences, constant_length=8.0
    )


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_hand_derived(name: str) -> None:
    assert share(name, LOSS, MASK, CU_SEQLENS, 6, 3).item() == pytest.approx(EXPECTED[name], rel=1e-6)


def test_every_aggregation_has_an_expected_value() -> None:
    assert EXPECTED.keys() == AGGREGATIONS.keys()


def test_sequence_sums_counts_and_loss_sequences() -> None:
    assert sequence_sums(LOSS, MASK, CU_SEQLENS).tolist() == [4.0, 12.0, 0.0, 10.0]
    assert sequence_counts(MASK, CU_SEQLENS).tolist() == [2.0, 3.0, 0.0, 1.0]
    assert loss_sequences(MASK, CU_SEQLENS).item() == 3  # the padded row is not counted


def test_gradients_by_hand() -> None:
    gradients = {
        # every masked token 1/6
        "token_mean": [0, 1 / 6, 1 / 6, 0, 1 / 6, 0, 1 / 6, 1 / 6, 0, 0, 0, 1 / 6],
        # 1/(tokens of its sequence)/3
        "sequence_mean": [0, 1 / 6, 1 / 6, 0, 1 / 9, 0, 1 / 9, 1 / 9, 0, 0, 0, 1 / 3],
        # 1/8/3
        "sequence_sum_norm": [0, 1 / 24, 1 / 24, 0, 1 / 24, 0, 1 / 24, 1 / 24, 0, 0, 0, 1 / 24],
    }
    for name, expected in gradients.items():
        loss = LOSS.clone().requires_grad_()
        share(name, loss, MASK, CU_SEQLENS, 6, 3).backward()
        assert loss.grad is not None
        torch.testing.assert_close(loss.grad, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize(("tokens", "sequences"), [(6.0, 3.0), (0.0, 0.0)])
def test_empty_mask_is_zero_and_keeps_the_graph(name: str, tokens: float, sequences: float) -> None:
    # An empty micro-batch of a full step, and a step without any loss token (counts 0).
    loss = torch.full((12,), NAN, requires_grad=True)
    total = share(name, loss, torch.zeros(12), CU_SEQLENS, tokens, sequences)
    total.backward()
    assert total.item() == 0.0
    assert loss.grad is not None
    assert loss.grad.tolist() == [0.0] * 12


def test_low_precision_is_summed_in_fp32() -> None:
    # 0.00390625 = 2^-8 is lost when added to 1 in bfloat16 (8 significant bits): 1 + 2^-8 = 257/256 in fp32.
    loss = torch.tensor([1.0, 2.0**-8], dtype=torch.bfloat16)
    total = share("token_mean", loss, torch.ones(2), cu_seqlens_of([2]), 1, 1)
    assert total.dtype == torch.float32
    assert total.item() == 257 / 256


def test_errors_name_the_problem() -> None:
    with pytest.raises(ValueError, match="aggregation='mean' is not one of token_mean"):
        share("mean", LOSS, MASK, CU_SEQLENS, 6, 3)
    with pytest.raises(ValueError, match=r"\(12, 1\).*must be \[T\]"):
        share("token_mean", LOSS[:, None], MASK, CU_SEQLENS, 6, 3)
    with pytest.raises(ValueError, match="constant_length=0"):
        AGGREGATIONS["sequence_sum_norm"].function(
            LOSS, MASK, CU_SEQLENS, global_tokens=6, global_sequences=3, constant_length=0
        )


def reference(name: str, losses: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """Unpacked, one sequence and one token at a time, in float64."""
    tokens, sequences, total = 0, 0, 0.0
    for loss, mask in zip(losses, masks, strict=True):
        kept = [float(x) for x, keep in zip(loss, mask, strict=True) if keep]
        tokens += len(kept)
        if not kept:
            continue
        sequences += 1
        total += {"token_mean": sum(kept), "sequence_mean": sum(kept) / len(kept)}.get(name, sum(kept) / 8)
    return total / max(1, tokens if name == "token_mean" else sequences)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(AGGREGATIONS)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    num_micro_batches=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_packing_gives_the_reference_and_its_gradients(
    name: str, lengths: list[int], num_micro_batches: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = [(rng.random(n) < rng.choice([0.0, 0.5, 1.0])).astype(np.float64) for n in lengths]
    losses = [np.where(mask > 0, rng.normal(size=mask.size), rng.choice([NAN, INF, 7.0])) for mask in masks]
    tokens = float(sum(mask.sum() for mask in masks))
    sequences = float(sum(mask.any() for mask in masks))

    def packed(parts: list[list[int]]) -> tuple[float, list[Tensor]]:
        """The objective and every sequence's gradient; `parts` lists the sequences of each micro-batch."""
        leaves = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in losses]
        total = 0.0
        for part in filter(None, parts):
            loss = torch.cat([leaves[i] for i in part])
            mask = torch.tensor(np.concatenate([masks[i] for i in part]), dtype=torch.float32)
            piece = share(name, loss, mask, cu_seqlens_of([lengths[i] for i in part]), tokens, sequences)
            piece.backward()
            total += piece.item()
        return total, [leaf.grad for leaf in leaves if leaf.grad is not None]

    order = rng.permutation(len(lengths)).tolist()
    cuts = np.array_split(np.array(order), num_micro_batches)
    whole, whole_gradients = packed([list(range(len(lengths)))])
    split, split_gradients = packed([cut.tolist() for cut in cuts])
    assert whole == pytest.approx(reference(name, losses, masks), abs=1e-5)
    assert split == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(split_gradients, whole_gradients, atol=1e-6, rtol=1e-5)
    assert len(whole_gradients) == len(lengths)
