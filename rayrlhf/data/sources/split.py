"""Hash-based split of rows into training and evaluation."""

from __future__ import annotations

import hashlib

from rayrlhf.data.sources.files import Split


def in_split(columns_json: str, split: Split, eval_share: float, seed: int) -> bool:
    """Whether a row belongs to a split, by a hash of its contents; an unreadable one is a training row.

    Equal rows are in the same split, and a row stays in its split when rows are added to the data.
    """
    if not eval_share:
        return True
    digest = hashlib.sha256(f"{seed}\n{columns_json}".encode()).digest()
    held_out = bool(columns_json) and int.from_bytes(digest[:8], "big") < eval_share * 2**64
    return held_out == (split == "eval")
