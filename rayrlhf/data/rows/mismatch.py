"""Mismatched responses of KTO: prompts with the responses to other prompts.

The loss measures how far the policy has moved from the reference by a KL term over such pairs (arXiv
2402.01306, section 4.1). They are made once, when the data is prepared, so that the term depends neither on
which rows share a batch nor on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayrlhf.data.example_store import SEQUENCE_FIELDS
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import STORE_BATCH_ROWS, ArrowRows


def mismatched(rows: ArrowRows, order: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """For every row in `order` [rows] the place in `order` of the row whose response it is given.

    A permutation without a fixed point, random by the seed, of rows with different prompts. Where more than
    half of the rows have the same prompt there is none: their responses then come from the other rows, some
    more than once; and where all have the same prompt, from rows of that prompt. Raises `DataError` for a
    single row.
    """
    return derangement(_prompts(rows, order), np.random.default_rng(list(seed)))


def _prompts(rows: ArrowRows, order: np.ndarray) -> np.ndarray:
    numbers: dict[bytes, int] = {}
    found = []
    for start in range(0, len(order), STORE_BATCH_ROWS):
        table = rows.take(order[start : start + STORE_BATCH_ROWS])
        prompt_tokens = table.column("prompt_tokens").to_pylist()
        for count, (input_ids,) in zip(prompt_tokens, table.column("input_ids").to_pylist(), strict=True):
            prompt = np.array(input_ids[:count], dtype=np.int32).tobytes()
            found.append(numbers.setdefault(prompt, len(numbers)))
    return np.array(found, dtype=np.int64)


def derangement(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every item [n] another one, of another group where there is one.

    With the items laid out group by group, a shift by the size of the largest group leaves every group.
    """
    count = len(groups)
    if count < 2:
        raise DataError(
            "KTO needs at least 2 rows: it compares a response with one to another prompt; add rows"
        )
    shuffled = rng.permutation(count)
    _, first, sizes = np.unique(groups[shuffled], return_index=True, return_counts=True)
    rank_of_group = dict(
        zip(groups[shuffled][first].tolist(), np.argsort(np.argsort(first)).tolist(), strict=True)
    )
    ranks = np.array([rank_of_group[group] for group in groups[shuffled].tolist()])
    laid_out = shuffled[np.argsort(ranks, kind="stable")]
    largest = int(sizes.max())
    partner = np.empty(count, dtype=np.int64)
    partner[laid_out] = np.roll(laid_out, -(largest if largest < count else 1))
    same = np.flatnonzero(groups[partner] == groups)
    if largest < count:
        for item in same.tolist():  # of a group that is more than half of all
            partner[item] = rng.choice(np.flatnonzero(groups != groups[item]))
    return partner


def with_mismatched(table: pa.Table, partners: pa.Table, max_tokens: int) -> pa.Table:
    """Gives every row of `table` a second sequence: its prompt and the response of its partner.

    What is longer than `max_tokens` loses the end of the response; one token of it remains at least.
    """
    own = zip(
        *(table.column(name).to_pylist() for name in ("input_ids", "loss_mask", "prompt_tokens")), strict=True
    )
    others = zip(
        *(partners.column(name).to_pylist() for name in ("input_ids", "loss_mask", "prompt_tokens")),
        strict=True,
    )
    input_ids, loss_mask = [], []
    for ([ids], [mask], start), ([other_ids], [other_mask], other_start) in zip(own, others, strict=True):
        input_ids.append([ids, [*ids[:start], *other_ids[other_start:]][:max_tokens]])
        loss_mask.append([mask, [*[0] * start, *other_mask[other_start:]][:max_tokens]])
    types = {field.name: field.type for field in SEQUENCE_FIELDS}
    return pa.table(
        {
            "num_tokens": table.column("num_tokens"),
            "input_ids": pa.array(input_ids, types["input_ids"]),
            "loss_mask": pa.array(loss_mask, types["loss_mask"]),
            "targets": pa.array([[[], []]] * table.num_rows, types["targets"]),
            "value": table.column("value"),
        }
    )
