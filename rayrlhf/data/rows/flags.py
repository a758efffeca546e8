"""Per-message loss flags, under the names that different libraries use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.data.rows.row import BadRow

# OpenAI's and Mistral's weight, Axolotl's train(ing), ms-swift's and XTuner's loss; torchtune's masked.
POSITIVE = ("weight", "train", "training", "trainable", "loss", "learn")
NEGATIVE = ("masked", "mask")
# Finer-grained flags, rejected rather than ignored: Axolotl's parts of a message, ms-swift's loss weights.
REFUSED = ("train_detail", "training_detail", "loss_scale", "loss_weight")
FLAGS = (*POSITIVE, *NEGATIVE, *REFUSED)
SPELLINGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def is_trained(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether the message's flags enable its loss; None if it has no flag.

    Raises `BadRow` for contradictory flags, and for values that are not boolean.
    """
    for key in REFUSED:
        if message.get(key) is not None:
            raise BadRow(
                f"{where} has {key!r}, which is not supported; wanted a flag for the whole message, such as "
                "weight: 0 or train: false"
            )
    found = {
        key: _truth(message[key], key, where) != (key in NEGATIVE)
        for key in (*POSITIVE, *NEGATIVE)
        if message.get(key) is not None
    }
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key}: {message[key]!r}" for key in found)
        raise BadRow(f"{where} has flags that contradict each other ({said}); keep one of them")
    return next(iter(found.values()), None)


def _truth(value: Any, key: str, where: str) -> bool:
    if isinstance(value, str):
        value = SPELLINGS.get(value.strip().lower(), value)
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadRow(
        f"{where} has {key}: {value!r}; wanted true or false, 1 or 0: a flag applies to the whole message"
    )
