"""What users load: a Hugging Face folder with safetensors, tokenizer and chat template."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_causal_lm(
    causal_lm: PreTrainedModel,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
) -> None:
    """Write the folder in one move: a reader sees the old export or the whole new one, never half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    causal_lm.save_pretrained(partial, state_dict=state_dict)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
