"""Checks of a job's model folders before it starts: adapters, tokenizers, generation configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from rayrlhf.config.model import ModelConfig
from rayrlhf.config.supervised import KdRunConfig, PrmRunConfig, RmRunConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template, single_token
from rayrlhf.hub.local import local_folder
from rayrlhf.models.distill import check_same_vocabulary
from rayrlhf.models.export import padding_token
from rayrlhf.models.generation import repair
from rayrlhf.runtime.preflight import InputError


def check_models(config: Any) -> None:
    """Check the models of a supervised job.

    Raises:
        InputError: for LoRA target modules that do not exist, a tokenizer with which no classifier can be
            exported, reward tokens that are not a single token, or a teacher with another vocabulary.
    """
    check_adapters(config)
    if isinstance(config, RmRunConfig | PrmRunConfig):
        model = config.model
        tokenizer = prompt_tokenizer(model.path, model.trust_remote_code, read_chat_template(config.data))
        _check("model.path", padding_token, tokenizer)
        if isinstance(config, PrmRunConfig):
            for word in config.algorithm.reward_tokens or ():
                _check("algorithm.reward_tokens", single_token, word, tokenizer)
    if isinstance(config, KdRunConfig):
        _check_teacher(config)


def check_adapters(config: Any) -> None:
    """Check LoRA and quantization settings of any training job, without reading weights.

    Raises:
        InputError: for target modules that a model does not have, or if it has no layer to quantize to 4
        bits.
    """
    model = config.model
    if model.lora is None:
        return
    from rayrlhf.models.expert_adapters import check_experts
    from rayrlhf.models.lora import check_targets  # imports PEFT, which takes a second

    critic = getattr(config, "critic", None)
    for path in dict.fromkeys([model.path, critic.path if critic is not None else None]):
        if path is None:
            continue
        found = AutoConfig.from_pretrained(
            local_folder(path, weights=False), trust_remote_code=model.trust_remote_code
        )
        with torch.device("meta"):
            decoder = AutoModel.from_config(found, trust_remote_code=model.trust_remote_code)
        _check("model.lora.target_modules", check_targets, decoder, model.lora)
        if model.lora.experts:
            _check("model.lora.experts", check_experts, decoder)
        if model.quantization is not None:
            from rayrlhf.models.quantize import layers_to_quantize  # imports bitsandbytes

            _check("model.quantization", layers_to_quantize, decoder)


def warn_invalid_generation_config(model: ModelConfig, say: Callable[[str], None]) -> None:
    """Warn of a generation_config.json that transformers would refuse to save; an export repairs it."""
    folder = local_folder(model.path, weights=False)
    if not Path(folder, GENERATION_CONFIG_NAME).is_file():
        return
    try:
        _, problem = repair(GenerationConfig.from_pretrained(folder))
    except (ValueError, TypeError, OSError) as error:  # invalid JSON, or not an object
        raise InputError(
            f"model.path={model.path}: its {GENERATION_CONFIG_NAME} cannot be read: {error}; "
            "repair the file, or remove it"
        ) from error
    if problem:
        say(f"warning: {GENERATION_CONFIG_NAME} of {model.path} is invalid, the export repairs it: {problem}")


def _check(key: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error


def _check_teacher(config: KdRunConfig) -> None:
    trust = config.model.trust_remote_code
    student, teacher = (
        prompt_tokenizer(path, trust).get_vocab() for path in (config.model.path, config.teacher.path)
    )
    sizes = [_head_size(path, config) for path in (config.model.path, config.teacher.path)]
    _check(
        "teacher.path",
        lambda: check_same_vocabulary(student, teacher, student_size=sizes[0], teacher_size=sizes[1]),
    )
    if config.teacher.location == "serve" and config.teacher.top_k > min(sizes):
        raise InputError(f"teacher.top_k={config.teacher.top_k}: wanted at most {min(sizes)}, the vocabulary")


def _head_size(path: str, config: KdRunConfig) -> int:
    """Number of rows of the output projection, including padding."""
    found = AutoConfig.from_pretrained(
        local_folder(path, weights=False), trust_remote_code=config.model.trust_remote_code
    )
    return found.get_text_config().vocab_size
