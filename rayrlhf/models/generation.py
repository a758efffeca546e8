"""Generation config of a checkpoint: end tokens, and repair so that it can be saved."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rayrlhf.data.ends import end_of_turn_id

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def ending_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the config, the tokenizer and the chat template."""
    own: Any = config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return [token for token in dict.fromkeys(found) if token is not None]


def exported_config(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A copy with the template's end tokens that `save_pretrained` accepts."""
    repaired, _ = repair(config)
    ends = ending_ids(repaired, tokenizer)
    if ends:
        repaired.eos_token_id = ends if len(ends) > 1 else ends[0]
    return repaired


def repair(config: GenerationConfig) -> tuple[GenerationConfig, str]:
    """A copy that `save_pretrained` accepts, and the problem of the original; empty if it had none.

    Many published files have a temperature but no `do_sample`. They are meant to sample, as engines do with
    them. If that does not repair it, only the token ids are kept: an export must not fail after training.
    """
    repaired: GenerationConfig = copy.deepcopy(config)
    problem = _problem(repaired)
    if not problem:
        return repaired, ""
    if repaired.temperature == 0:
        repaired.temperature = None
    else:
        repaired.do_sample = True
    if _problem(repaired):
        repaired = GenerationConfig(**{name: getattr(config, name) for name in TOKENS})
    return repaired, problem


def _problem(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""
