"""Flags on a message that say whether it is trained on, under the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.data.rows.row import BadRow

# OpenAI's and Mistral's weight, Axolotl's train(ing), ms-swift's and XTuner's loss; torchtune's masked.
POSITIVE = ("weight", "train", "training", "trainable", "loss", "learn")
NEGATIVE = ("masked", "mask")
# Finer flags, which would be lost silently: Axolotl's parts of a message, ms-swift's weights of a loss.
REFUSED = ("train_detail", "training_detail", "loss_scale", "loss_weight")
FLAGS = (*POSITIVE, *NEGATIVE, *REFUSED)
SPELLINGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def is_trained(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether the message's flags want a loss on it; None where it has no flag.

    Raises `BadRow` for flags that contradict each other, and for what is neither yes nor no.
    """
    for key in REFUSED:
        if message.get(key) is not None:
            raise BadRow(
                f"{where} has {key!r}, which is not supported; wanted the whole message learnt or not, "
                "such as weight: 0 or train: false"
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
        f"{where} has {key}: {value!r}; wanted true or false, 1 or 0: a message is learnt whole or not at all"
    )
