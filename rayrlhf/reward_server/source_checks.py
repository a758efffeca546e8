"""Checks of a reward server's config before Ray starts; reads the facts of its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rayrlhf.config.serve_reward import ServedFunction, ServedModel, ServeRewardConfig
from rayrlhf.data.chat import prompt_tokenizer
from rayrlhf.hub.local import local_folder
from rayrlhf.models.load import has_packed_scorer
from rayrlhf.reward.functions import find_function
from rayrlhf.reward.items import RewardError
from rayrlhf.reward.reading import INPUT_TEMPLATE, read_at
from rayrlhf.reward_server.deployment import Served
from rayrlhf.reward_server.requests import ModelFacts
from rayrlhf.runtime.preflight import InputError, check_model


def check_sources(config: ServeRewardConfig) -> list[Served]:
    """Check and resolve the sources without Ray. Raises `InputError`, `DataError` or `RewardError`."""
    found = []
    for index, (name, source) in enumerate(
        zip(config.reward.source_names, config.reward.sources, strict=True)
    ):
        key = f"reward.sources.{index}"
        if isinstance(source, ServedFunction):
            try:
                found.append(
                    Served(
                        name,
                        source,
                        code=find_function(source.function, source, config.server.timeout_seconds),
                    )
                )
            except RewardError as error:
                raise RewardError(f"{key}.function: {error}") from error
        else:
            check_model(f"{key}.path", source.path)
            if Path(source.path).is_dir():  # replicas run in other working directories
                source = source.model_copy(update={"path": str(Path(source.path).resolve())})
            found.append(Served(name, source, facts=_facts(key, source)))
    return found


def _facts(key: str, source: ServedModel) -> ModelFacts:
    """Raises `InputError` for a checkpoint that is not a reward model, or contradicts the source's config."""
    found: Any = AutoConfig.from_pretrained(local_folder(source.path, weights=False))
    architectures = found.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures) or found.num_labels != 1:
        raise InputError(
            f"{key}.path={source.path}: architectures={architectures} with {found.num_labels} labels; wanted "
            "a reward model: an AutoModelForSequenceClassification checkpoint with num_labels=1, such as "
            "jobs/rm.py exports"
        )
    is_decoder = has_packed_scorer(source.path)
    tokenizer = prompt_tokenizer(source.path)
    eos = tokenizer.eos_token_id
    if source.append_eos and (eos is None or not is_decoder):
        why = "its tokenizer has no eos token" if eos is None else "an encoder adds its own special tokens"
        raise InputError(f"{key}.append_eos=true: {why}; set it to false")
    mean, std = (0.0, 1.0) if not source.normalize else _mean_and_std(key, source, found)
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    if source.max_tokens is not None and positions is not None and source.max_tokens > positions:
        raise InputError(
            f"{key}.max_tokens={source.max_tokens}: the model has {positions} positions; "
            f"set it to {positions} or less, or leave it out"
        )
    longest = max(map(len, tokenizer.get_vocab()))
    settings = found.to_dict()
    return ModelFacts(
        source.max_tokens or positions,
        is_decoder,
        mean,
        std,
        longest,
        read_at=read_at(source.read_at, settings),
        input_template=settings.get(INPUT_TEMPLATE),
    )


def _mean_and_std(key: str, source: ServedModel, found: Any) -> tuple[float, float]:
    mean, std = getattr(found, "mean", None), getattr(found, "std", None)
    if not isinstance(mean, int | float) or not isinstance(std, int | float) or not std > 0:
        raise InputError(
            f"{key}.normalize=true: config.json of {source.path} has mean={mean} and std={std}; wanted the "
            "mean and the standard deviation (> 0) of its scores, as jobs/rm.py writes them; "
            "set normalize=false, or add both to it"
        )
    return float(mean), float(std)
