"""Settings that a vision-language model does not support here: where its images would be lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from rayrlhf.config.base import Problem
from rayrlhf.models.vision import is_vision_language

IMAGE_JOBS = ("sft", "dpo", "kto")  # supervised jobs whose models see images


def vision_problems(config: Any, models: Mapping[str, PreTrainedConfig]) -> Iterator[Problem]:
    """Of a training job with these models, by key (`model.path`, …)."""
    seen = {key: is_vision_language(found) for key, found in models.items()}
    if not seen.get("model.path"):
        for key in (key for key, sees in seen.items() if sees):
            yield _blind(key, models[key].model_type, "model.path", models["model.path"].model_type)
        return
    kind = models["model.path"].model_type
    for key in ("critic.path", "ref.path"):
        if not seen.get(key, True):
            yield _blind("model.path", kind, key, models[key].model_type)
    yield from _unsupported(config, kind)


def _blind(seeing: str, kind: str, blind: str, other: str) -> Problem:
    return Problem(
        blind,
        got=f"a {other} with {seeing} a {kind}: it would not see the images",
        wanted=f"a {kind}",
        fix=f"choose a {kind} for both, or a model without vision for both",
    )


def _unsupported(config: Any, kind: str) -> Iterator[Problem]:
    job = getattr(config, "job", None)
    if job is not None and job not in IMAGE_JOBS:
        yield Problem(
            "model.path",
            got=f"a {kind} with job: {job}",
            wanted=f"a model without vision: images are for policies and {', '.join(IMAGE_JOBS)}",
            fix="choose another model",
        )
    model = config.model
    if model.sequence_parallel > 1:
        yield Problem(
            "model.sequence_parallel",
            got=f"{model.sequence_parallel} with a {kind}",
            wanted="1: ranks cannot share a sequence with images",
            fix="set model.sequence_parallel to 1",
        )
    if model.quantization is not None:
        yield Problem(
            "model.quantization",
            got=f"{model.quantization} with a {kind}",
            wanted="nothing: the 4-bit form of a vision tower has not been tried",
            fix="remove model.quantization",
        )
    ref = getattr(config, "ref", None)
    if ref is not None and getattr(ref, "engine", "packed") == "vllm":
        yield Problem(
            "ref.engine",
            got=f"vllm with a {kind}",
            wanted="packed: a reference in vLLM is not sent the images",
            fix="remove ref.engine",
        )
    rollout, reward = getattr(config, "rollout", None), getattr(config, "reward", None)
    if rollout is not None and rollout.environment is not None:
        yield Problem(
            "rollout.environment",
            got=f"an environment with a {kind}",
            wanted="prompts from data: environments show text only",
            fix="remove rollout.environment, or choose a model without vision",
        )
    for index, source in enumerate(reward.sources if reward is not None else ()):
        if source.type == "model":
            yield Problem(
                f"reward.sources.{index}.type",
                got=f"model with a {kind}",
                wanted="a function, math, reasoning_gym or remote: reward models read text only",
                fix=f"replace reward.sources.{index}",
            )
