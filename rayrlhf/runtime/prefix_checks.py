"""Whether a job's models can compute a prefix that sequences share once (train.share_prefixes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import KdRunConfig, SupervisedConfig
from rayrlhf.models.vision import is_vision_language
from rayrlhf.runtime.architecture_checks import Judged, judge

C = TypeVar("C", bound=Any)
COMPUTES_BATCHES = ("model.path", "critic.path", "ref.path")  # models that get the job's micro-batches


def with_prefixes_shared(config: C, say: Callable[[str], None]) -> C:
    """The config; without train.share_prefixes where a training job's results would not be the same."""
    if not _is_training(config) or not config.train.share_prefixes:
        return config
    reason = why_not(config, list(judge(config)))
    if not reason:
        return config
    say(f"train.share_prefixes=false: {reason}")
    return config.model_copy(update={"train": config.train.model_copy(update={"share_prefixes": False})})


def _is_training(config: Any) -> bool:
    return isinstance(config, PolicyRunConfig | SupervisedConfig)


def why_not(config: Any, models: Sequence[Judged]) -> str:
    """Why the job cannot share prefixes; empty if it can."""
    if config.model.sequence_parallel > 1:
        return "ranks that split a sequence (model.sequence_parallel) hold different tokens of it"
    if isinstance(config, KdRunConfig):
        return "distillation computes each sequence in full, like its teacher"
    if config.model.lora is not None and config.model.lora.dropout > 0:
        return "with model.lora.dropout, the tokens of each sequence are dropped independently"
    drops = getattr(config.train, "dropout", False)
    for model in models:
        if model.key not in COMPUTES_BATCHES:
            continue
        if drops and has_dropout(model.config):
            return f"with train.dropout, the tokens of each sequence are dropped independently ({model.kind})"
        if is_vision_language(model.config):
            return f"{model.key}: the positions of a {model.kind}'s tokens depend on its images"
        if not model.verdict.shares_prefixes:
            return f"{model.key}: a {model.kind} has layers that need each sequence in full"
    return ""


def has_dropout(config: PreTrainedConfig) -> bool:
    """Whether a model with this config has some probability of dropout, such as GPT-2's attn_pdrop."""
    values = config.get_text_config().to_dict().items()
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values)
