"""Model export: a Hugging Face folder with safetensors, tokenizer and chat template.

Written by rank 0 from full tensors, as gathered by `full_state_dict`, with transformers' own classes: loading
the folder does not need rayrlhf.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayrlhf.models.adapters import TrainedAdapter
from rayrlhf.models.generation import exported_config
from rayrlhf.models.heads import ScoreModel, StepModel
from rayrlhf.models.modes import honour_umask
from rayrlhf.models.vision import copy_processor, is_vision_language

STEP_LABELS = {0: "bad", 1: "good"}
HEAD = "score"  # head name of transformers' decoder-style classifiers
ADAPTER_FOLDER = "adapter"  # subfolder of an export, if adapters were trained


def export_causal_lm(
    causal_lm: PreTrainedModel,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    adapter: TrainedAdapter | None = None,
) -> None:
    """Write an `AutoModelForCausalLM`, or an `AutoModelForImageTextToText` with the processor of its images;
    `state_dict` has the names of `causal_lm`'s parameters.

    With an `adapter`, which is already merged in `state_dict`, the subfolder `adapter` has the adapter alone.
    """

    def save(folder: Path) -> None:
        with _generating_as(causal_lm, tokenizer):
            causal_lm.save_pretrained(folder, state_dict=dict(state_dict))  # it removes tied weights from it
        if is_vision_language(causal_lm.config):
            copy_processor(str(causal_lm.name_or_path), folder)  # the folder that it was loaded from
        if adapter is not None:
            _write_adapter(folder / ADAPTER_FOLDER, adapter, task="CAUSAL_LM")

    _write(save, tokenizer, path)


@contextmanager
def _generating_as(causal_lm: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside the context, the model's generation config is the one to export."""
    own = getattr(causal_lm, "generation_config", None)
    if own is None:  # custom model code that cannot generate
        yield
        return
    causal_lm.generation_config = exported_config(own, tokenizer)
    try:
        yield
    finally:
        causal_lm.generation_config = own


def export_reward_model(
    model: ScoreModel,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    mean: float | None = None,
    std: float | None = None,
    adapter: TrainedAdapter | None = None,
    reading: Mapping[str, str] | None = None,
) -> None:
    """Write an `AutoModelForSequenceClassification` with one label, from `model`'s own `state_dict`.

    `mean` and `std` of the scores are saved in the config, for users who want to normalise them; the logits
    are never normalised. `reading` is saved there too, for `reward.reading`. Raises `ValueError` for a
    tokenizer without a usable padding token (see `padding_token`).
    """
    padded = with_padding(tokenizer)
    extras = {name: value for name, value in {"mean": mean, "std": std}.items() if value is not None}
    config = _config_of(model, padded, num_labels=1, **extras, **(reading or {}))
    kind = _Classifier(AutoModelForSequenceClassification, "SEQ_CLS")
    _write(lambda folder: _save_classifier(kind, config, state_dict, adapter, folder), padded, path)


def export_step_model(
    model: StepModel,
    state_dict: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    step_token: str,
    adapter: TrainedAdapter | None = None,
) -> None:
    """Write an `AutoModelForTokenClassification` with the labels bad and good, from `model`'s `state_dict`.

    A step is scored at the `step_token` that ends it; the config has it under that name. Raises like
    `export_reward_model`.
    """
    padded = with_padding(tokenizer)
    label_ids = {label: index for index, label in STEP_LABELS.items()}
    config = _config_of(model, padded, id2label=STEP_LABELS, label2id=label_ids, step_token=step_token)
    kind = _Classifier(AutoModelForTokenClassification, "TOKEN_CLS")
    _write(lambda folder: _save_classifier(kind, config, state_dict, adapter, folder), padded, path)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad sequences for a classifier: any special one except the end of a sequence.

    transformers reads a sequence's score at its last token that is not padding. If the end-of-sequence token
    is also the padding token, a common setting for tokenizers without padding, the score would be read one
    token too early. Raises `ValueError` for a tokenizer that has no other.
    """
    named = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    for token in [*named, *tokenizer.all_special_tokens]:
        if token is not None and token != tokenizer.eos_token:
            return str(token)
    raise ValueError(
        f"the tokenizer has no special token but {tokenizer.eos_token!r}, which ends sequences: "
        "set another pad_token in tokenizer_config.json, or batches cannot be scored"
    )


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads with `padding_token`."""
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padding_token(tokenizer)
    return padded


def _config_of(model: ScoreModel | StepModel, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    config: Any = copy.deepcopy(model.decoder.config)
    for name, value in changes.items():
        setattr(config, name, value)
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return config


class _Classifier(NamedTuple):
    auto: Any  # transformers' Auto class
    task: str  # PEFT's task type


def _save_classifier(
    kind: _Classifier,
    config: Any,
    state_dict: dict[str, Tensor],
    adapter: TrainedAdapter | None,
    folder: Path,
) -> None:
    """Save `decoder.*` and `head.*` as the architecture's classifier, which must have exactly these."""
    with torch.device("meta"):
        model = kind.auto.from_config(config)
    ours = {"decoder": model.base_model_prefix, "head": HEAD}

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = ((name.partition("."), tensor) for name, tensor in tensors.items())
        return {f"{ours[part]}.{rest}": tensor for (part, _, rest), tensor in parts}

    model.load_state_dict(renamed(state_dict), assign=True)
    model.save_pretrained(folder)
    if adapter is not None:
        head = {name: tensor for name, tensor in state_dict.items() if name.startswith("head.")}
        whole = adapter._replace(state=renamed(adapter.state | head))
        _write_adapter(folder / ADAPTER_FOLDER, whole, task=kind.task, head=HEAD)


def _write_adapter(folder: Path, adapter: TrainedAdapter, *, task: str, head: str | None = None) -> None:
    from rayrlhf.models.lora import write_adapter  # imports PEFT, which takes a second

    write_adapter(folder, adapter, task=task, head=head)


def _write(save_model: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write the folder atomically: a reader sees the old export or the complete new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial)
    for folder in (partial, partial / ADAPTER_FOLDER):
        if folder.is_dir():
            tokenizer.save_pretrained(folder)
    honour_umask(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
