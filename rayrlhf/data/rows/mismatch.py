"""Mismatched responses for KTO: prompts paired with the responses to other prompts.

The loss measures how far the policy has moved from the reference by a KL term over such pairs (arXiv
2402.01306, section 4.1). They are created once, when the data is prepared, so that the term depends neither
on the composition of batches nor on the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import SEQUENCE_FIELDS, STORE_BATCH_ROWS, ArrowRows


def mismatched(rows: ArrowRows, order: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """For every row in `order` [rows] the index in `order` of the row whose response it gets.

    A seeded random permutation without fixed points that pairs rows with different prompts. If more than half
    of the rows have the same prompt, none exists: their responses then come from the other rows, some more
    than once; if all have the same prompt, from rows of that prompt. Raises `DataError` for a single row.
    """
    return derangement(_prompts(rows, order), np.random.default_rng(list(seed)))


def _prompts(rows: ArrowRows, order: np.ndarray) -> np.ndarray:
    numbers: dict[bytes, int] = {}
    found = []
    for start in range(0, len(order), STORE_BATCH_ROWS):
        table = rows.take(order[start : start + STORE_BATCH_ROWS])
        columns = [table.column(name).to_pylist() for name in ("prompt_tokens", "input_ids", "images")]
        for count, (input_ids,), images in zip(*columns, strict=True):
            prompt = hashlib.sha256(np.array(input_ids[:count], dtype=np.int32).tobytes())
            for image in images:  # prompts with images of one size have the same tokens
                prompt.update(image)
            found.append(numbers.setdefault(prompt.digest(), len(numbers)))
    return np.array(found, dtype=np.int64)


def derangement(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every item [n] another one, from another group if there is one.

    With the items sorted by group, a shift by the largest group's size moves every item to another group.
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
        for item in same.tolist():  # of a group with more than half of all items
            partner[item] = rng.choice(np.flatnonzero(groups != groups[item]))
    return partner


def with_mismatched(table: pa.Table, partners: pa.Table, max_tokens: int) -> pa.Table:
    """Adds a second sequence to every row of `table`: its prompt and the response of its partner.

    Sequences longer than `max_tokens` lose the end of the response; at least one token of it remains.
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
            "images": table.column("images"),
            "image_tokens": table.column("image_tokens"),
        }
    )
