"""From a checkpoint folder to a module: policy, critic, reward model, tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rayrlhf.config.model import ModelConfig
from rayrlhf.models.attention import attention_implementation
from rayrlhf.models.heads import ScoreModel, ValueModel
from rayrlhf.models.logprobs import PolicyModel


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is the slower of the two."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_policy(config: ModelConfig, path: str, *, device: torch.device, chunk_tokens: int) -> PolicyModel:
    """The actor or the reference, in training mode (`from_pretrained` alone leaves a model in eval mode)."""
    causal_lm = AutoModelForCausalLM.from_pretrained(path, **_load_options(config, device))
    return PolicyModel(causal_lm, chunk_tokens=chunk_tokens).train()


def load_critic(config: ModelConfig, path: str, *, device: torch.device) -> ValueModel:
    """A critic from a language model (a new head, all values 0) or from a reward model (its score head)."""
    decoder, head = _decoder_and_head(config, path, device)
    return ValueModel(decoder, head).train()


def load_scorer(config: ModelConfig, path: str, *, device: torch.device) -> ScoreModel:
    """A decoder-style reward model (`AutoModelForSequenceClassification`, one label), in eval mode."""
    decoder, head = _decoder_and_head(config, path, device)
    return ScoreModel(decoder, head).eval()


def is_sequence_classifier(path: str, *, trust_remote_code: bool = False) -> bool:
    architectures = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def checkpoint_activations(model: Any) -> None:
    """Keep only each layer's input in the forward pass and compute the rest again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def has_packed_scorer(path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether this checkpoint's classifier is a decoder with a `score` head: it can read packed sequences."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return classifier is not None and issubclass(classifier, GenericForSequenceClassification)


def _decoder_and_head(config: ModelConfig, path: str, device: torch.device) -> tuple[nn.Module, nn.Linear]:
    options = _load_options(config, device)
    if is_sequence_classifier(path, trust_remote_code=config.trust_remote_code):
        model = AutoModelForSequenceClassification.from_pretrained(path, **options)
        if model.config.num_labels != 1:
            raise ValueError(
                f"{path} has {model.config.num_labels} labels; a reward model or critic needs exactly 1"
            )
        return model.base_model, model.score
    decoder = AutoModel.from_pretrained(path, **options)
    head = nn.Linear(decoder.config.get_text_config().hidden_size, 1, bias=False, dtype=options["dtype"])
    nn.init.zeros_(head.weight)
    return decoder, head


def _load_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    return {
        "dtype": resolve_dtype(config.dtype, device),
        "attn_implementation": attention_implementation(config.attention, device),
        "trust_remote_code": config.trust_remote_code,
    }
