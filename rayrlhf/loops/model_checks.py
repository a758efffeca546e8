"""What a supervised job will need of its models' folders at its end, found out before it begins."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from rayrlhf.config.supervised import KdRunConfig, PrmRunConfig, RmRunConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.loops.checks import InputError
from rayrlhf.loops.tasks.prm import single_token
from rayrlhf.models.distill import check_same_vocabulary
from rayrlhf.models.export import padding_token


def check_models(config: Any) -> None:
    """Raises `InputError` for a tokenizer that a classifier cannot be exported with, for reward words that
    are not one token, and for a teacher of another vocabulary.
    """
    if isinstance(config, RmRunConfig | PrmRunConfig):
        model = config.model
        tokenizer = prompt_tokenizer(model.path, model.trust_remote_code, read_chat_template(config.data))
        _ask("model.path", padding_token, tokenizer)
        if isinstance(config, PrmRunConfig):
            for word in config.algorithm.reward_tokens or ():
                _ask("algorithm.reward_tokens", single_token, word, tokenizer)
    if isinstance(config, KdRunConfig):
        sizes = [_vocabulary(path, config) for path in (config.model.path, config.teacher.path)]
        _ask("teacher.path", check_same_vocabulary, *sizes)


def _ask(key: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error


def _vocabulary(path: str, config: KdRunConfig) -> int:
    found = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    return found.get_text_config().vocab_size
