"""Shared prefixes: which tokens of a stream are computed once."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.batch import (
    PackedBatch,
    cu_seqlens_of,
    pack_examples,
    pack_samples,
    pack_values,
    tokens_of,
)
from rayrlhf.prefixes import SharedPrefixes
from rayrlhf.samples import EncodedImage, Example, Prompt, TokenSequence
from tests.samples import make_prompt, make_sample

Sequences = list[list[int]]


def shared(sequences: Sequences, min_tokens: int = 2) -> SharedPrefixes | None:
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    return SharedPrefixes.of(cu_seqlens_of([len(s) for s in sequences]), ids, min_tokens=min_tokens)


# Few ids and a common beginning, so that many prefixes are shared.
trees = st.lists(
    st.builds(
        lambda head, tail: [1, 2, 3][:head] + tail, st.integers(0, 3), st.lists(st.integers(1, 3), min_size=1)
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees)
def test_each_segment_has_the_keys_of_its_sequence(sequences: Sequences) -> None:
    found = shared(sequences)
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    if found is None:
        assert fewest_rows(sequences, 2) == len(ids)
        return
    assert found.num_rows == fewest_rows(sequences, 2) < len(ids)
    computed = ids[found.tokens]
    assert torch.equal(computed[found.rows], ids)
    # The keys of a token up to its own row are the tokens of its sequence up to itself.
    segment_of_row = torch.repeat_interleave(torch.arange(len(found.lengths)), torch.tensor(found.lengths))
    for sequence, rows in zip(sequences, found.rows.split([len(s) for s in sequences]), strict=True):
        for position, row in enumerate(rows.tolist()):
            segment = int(segment_of_row[row])
            first, stop = found.cu_seqlens_k[segment : segment + 2].tolist()
            before = int(found.cu_seqlens[segment + 1]) - 1 - row  # the kernel aligns the last ones
            keys = found.key_rows[first : stop - before]
            assert computed[keys].tolist() == sequence[: position + 1]
    assert found.longest_keys == int(found.cu_seqlens_k.diff().max()) <= max(map(len, sequences))


def fewest_rows(sequences: Sequences, min_tokens: int) -> int:
    """Over all divisions into runs of neighbours, each of which shares what all have in common."""
    best = sum(map(len, sequences))
    for count in range(len(sequences)):
        for cuts in combinations(range(1, len(sequences)), count):
            runs = [sequences[a:b] for a, b in pairwise([0, *cuts, len(sequences)])]
            best = min(best, sum(rows_of(run, min_tokens) for run in runs))
    return best


def rows_of(run: Sequence[list[int]], min_tokens: int) -> int:
    longest = min(map(len, run)) - 1
    common = next((n for n in range(longest) if len({s[n] for s in run}) > 1), longest)
    common = common if common >= min_tokens else 0
    return sum(map(len, run)) - (len(run) - 1) * common


def test_a_group_is_not_given_up_for_what_all_begin_with() -> None:
    system, first, second = [1, 2, 3], [4, 5, 6, 7], [8, 9, 4, 5]
    found = shared([system + first + [n] for n in (1, 2, 3)] + [system + second + [n] for n in (1, 2, 3)])
    assert found is not None
    assert found.lengths == (7, 1, 1, 1, 7, 1, 1, 1) and found.prefix_of == (-1, 0, 0, 0, -1, 4, 4, 4)


def test_prefixes_that_are_too_short_or_differ_in_position_are_not_shared() -> None:
    assert shared([[1, 2, 3, 4], [1, 2, 3, 5]], min_tokens=4) is None
    assert shared([[1, 2, 3, 4]]) is None
    ids, ends = torch.tensor([1, 2, 3, 4, 1, 2, 3, 5]), cu_seqlens_of([4, 4])
    other_positions = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    assert SharedPrefixes.of(ends, ids, other_positions, min_tokens=2) is None


PROMPT = make_prompt(range(20, 40))


def group(*responses: Sequence[int]) -> PackedBatch:
    samples = [make_sample(response, prompt=PROMPT, sample_index=i) for i, response in enumerate(responses)]
    return pack_samples(samples, share_prefixes=True)


def test_a_batch_keeps_its_prefixes() -> None:
    batch = group([1, 2], [3], [1, 2])
    assert batch.prefixes is not None
    assert batch.num_tokens == 65 and batch.num_rows == 25
    values = pack_values(batch, torch.zeros(65), torch.zeros(65))
    for other in (
        batch.to("cpu"),
        tokens_of(batch),
        batch.without_loss(),
        values,
        replace(batch, is_padding=False),
    ):
        again: PackedBatch = pickle.loads(pickle.dumps(other))
        assert again.prefixes is not None
        assert torch.equal(again.prefixes.rows, batch.prefixes.rows)
        assert again.prefixes.lengths == batch.prefixes.lengths
    moved = batch.to("meta")
    assert moved.prefixes is not None
    assert moved.prefixes.rows.is_meta and moved.prefixes.key_rows.is_meta and moved.input_ids.is_meta


def test_samples_with_other_routes_share_what_precedes_them() -> None:
    samples = [make_sample([1, 2], prompt=PROMPT, sample_index=i) for i in range(2)]
    routes = torch.zeros(22, 1, 2, dtype=torch.int16)
    others = routes.clone()
    others[18] = 3
    routed = [replace(s, routed_experts=r.numpy()) for s, r in zip(samples, (routes, others), strict=True)]
    batch = pack_samples(routed, share_prefixes=True)
    assert batch.prefixes is not None and batch.prefixes.lengths == (18, 4, 4)


def test_pairs_share_their_prompt_and_plain_batches_nothing() -> None:
    prompt = list(range(20, 40))
    pair = tuple(TokenSequence([*prompt, *answer], [0] * 20 + [1] * len(answer)) for answer in ([1, 2], [3]))
    batch = pack_examples([Example(0, pair)], share_prefixes=True)
    assert batch.prefixes is not None and batch.prefixes.lengths == (20, 2, 1)
    assert pack_examples([Example(0, pair)]).prefixes is None


def test_images_are_refused() -> None:
    prompt = Prompt(0, list(range(20, 40)), "", images=(EncodedImage(b"", 4),))
    samples = [make_sample([1], prompt=prompt, sample_index=i) for i in range(2)]
    with pytest.raises(ValueError, match=r"set train\.share_prefixes to false"):
        pack_samples(samples, share_prefixes=True)
