"""Checks before Ray starts whether the architectures of a job's models are computed correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from rayrlhf.capacity.model_shape import config_folder
from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.chains import AnyChain
from rayrlhf.config.model_paths import model_paths
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import PrmRunConfig, RmRunConfig
from rayrlhf.hub.local import local_folder
from rayrlhf.models.load import has_packed_scorer
from rayrlhf.models.probe import Head, Verdict, rope_limits, verdict_of
from rayrlhf.models.router_probe import router_verdict
from rayrlhf.runtime.adapter_sync import adapter_sync
from rayrlhf.runtime.length_checks import longest_sequences
from rayrlhf.runtime.vision_checks import vision_problems


class Judged(NamedTuple):
    key: str
    config: PreTrainedConfig
    verdict: Verdict

    @property
    def kind(self) -> str:
        return self.config.model_type

    def line(self) -> str:
        line = f"{self.key}: {self.kind} is {self.verdict.name}"
        if self.verdict.streams is None or not self.verdict.streams.is_packed:
            line += f": {self.verdict.reason}"
        if self.verdict.streams is None:
            return line
        slower = "" if self.verdict.streams.is_packed else "; right, but slower"
        return f"{line} (largest difference measured {self.verdict.deviation:.1e}{slower})"


def check_architectures(config: Any, say: Callable[[str], None]) -> None:
    """Check the models of a training job, or of a chain's first round. Raises `ConfigError` with every model
    that is refused.
    """
    if isinstance(config, AnyChain):
        config = config.training_config(1, config.model.path)
    if not hasattr(config, "train"):
        return
    problems: list[Problem] = []
    models: dict[str, PreTrainedConfig] = {}
    for judged in judge(config):
        models[judged.key] = judged.config
        if judged.verdict.streams is None:
            problems.append(
                Problem(
                    judged.key,
                    got=f"a {judged.kind}: {judged.verdict.reason}",
                    wanted="an architecture that is computed correctly here",
                    fix="choose another model: docs/architectures.md lists those that were tried",
                )
            )
        elif not judged.verdict.streams.is_packed:
            say(judged.line())
            problems += _compiled(config, judged)
        if judged.key == "model.path":
            problems += [*_shared(config, judged), *_rotated_otherwise(config, judged)]
            problems += _routed(config, judged)
    problems += vision_problems(config, models)
    if problems:
        raise ConfigError(problems)


def _shared(config: Any, judged: Judged) -> Iterator[Problem]:
    """Sequence parallelism requires that every layer attends through our kernel."""
    verdict, size = judged.verdict, config.model.sequence_parallel
    if size > 1 and verdict.streams is not None and not verdict.shares_sequences:
        why = (
            verdict.reason
            or f"{verdict.layers - verdict.attending} of {verdict.layers} layers mix tokens otherwise"
        )
        yield Problem(
            "model.sequence_parallel",
            got=f"{size} with a {judged.kind}: {why}",
            wanted="1: ranks share a sequence only in layers that attend through our kernel",
            fix="set model.sequence_parallel to 1",
        )


def _compiled(config: Any, judged: Judged) -> Iterator[Problem]:
    """Layers that mix tokens in ways of their own are not compiled."""
    key = "model.compile"
    if judged.key.startswith("reward."):
        key = judged.key.removesuffix("path") + "compile"
        compiles = config.reward.sources[int(judged.key.split(".")[2])].compile
    else:
        compiles = config.model.compiles
    if not compiles:
        return
    yield Problem(
        key,
        got=f"true with a {judged.kind} ({judged.key}): {judged.verdict.reason}",
        wanted="false: these layers would be compiled for every length again",
        fix=f"remove {key}",
    )


def _routed(config: Any, judged: Judged) -> Iterator[Problem]:
    """Settings of mixtures of experts require routers that are understood."""
    coef = config.model.aux_loss_coef
    replays = hasattr(config, "rollout") and config.rollout.router_replay
    if not coef and not replays:
        return
    routers = router_verdict(judged.config, trust_remote_code=config.model.trust_remote_code)
    packed = judged.verdict.streams is None or judged.verdict.streams.is_packed
    if replays and not (routers.can_replay and packed):
        yield Problem(
            "rollout.router_replay",
            got=f"true with a {judged.kind}: {routers.reason or 'its sequences cannot share a stream'}",
            wanted="false: the engine's choice of experts cannot be replayed in this model",
            fix="remove rollout.router_replay",
        )
    if coef and routers.scoring is None:
        yield Problem(
            "model.aux_loss_coef",
            got=f"{coef:g} with a {judged.kind}: {routers.reason}",
            wanted="0: this model has no balance loss",
            fix="remove model.aux_loss_coef, or choose a mixture of experts with softmax or sigmoid routers",
        )


def _rotated_otherwise(config: Any, judged: Judged) -> Iterator[Problem]:
    """Sequences that engines and trainer would rotate differently: vLLM selects RoPE frequencies once for all
    sequences of an engine, transformers per sequence length. Tiny Phi-3 with longrope differs by 7.7 nats if
    longer sequences are allowed, by 6e-6 if not.
    """
    if not hasattr(config, "rollout") or judged.verdict.streams is None:
        return
    longest = max(longest.tokens for longest in longest_sequences(config) if longest.in_engine)
    for kind, limit in rope_limits(judged.config):
        if longest > limit:
            yield Problem(
                judged.key,
                got=f"a {judged.kind} with rope_type {kind} and sequences of up to {longest} tokens: "
                f"beyond {limit} engines and trainer rotate them differently",
                wanted=f"prompts and responses of {limit} tokens together at most",
                fix="lower data.max_prompt_tokens or rollout.sampling.max_new_tokens",
            )


def _fetched(path: str) -> str:
    return local_folder(path, weights=False)


def judge(config: Any, folder_of: Callable[[str], str] = _fetched) -> Iterator[Judged]:
    """Verdicts of all models that the job's trainers compute; `folder_of(path)` has a model's config.json."""
    trust = config.model.trust_remote_code
    ref = getattr(config, "ref", None)
    for key, named in model_paths(config):
        path = folder_of(named)
        if key == "ref.path" and ref is not None and getattr(ref, "engine", "packed") == "vllm":
            continue
        if key.startswith("reward.") and not has_packed_scorer(path):
            continue  # it runs on padded batches with transformers' own forward pass
        found = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        heads: list[Head] = [_head(config, key)]
        if key == "model.path" and getattr(config, "critic", None) is not None and config.critic.path is None:
            heads.append("values")
        verdicts = [
            verdict_of(found, longest=longest_sequence(config), head=head, trust_remote_code=trust)
            for head in heads
        ]
        refused = [verdict for verdict in verdicts if verdict.streams is None]
        yield Judged(key, found, (refused or verdicts)[0])


def _head(config: Any, key: str) -> Head:
    if key == "model.path":
        return "values" if isinstance(config, RmRunConfig | PrmRunConfig) else "policy"
    return "values" if key.startswith(("critic.", "reward.")) else "policy"


def longest_sequence(config: Any) -> int:
    """Number of tokens of the longest sequence that the job allows."""
    return max(longest.tokens for longest in longest_sequences(config))


def architecture_lines(config: Any) -> Iterator[str]:
    """For `rayrlhf plan`: a line per model whose config.json is on this machine, and one on how LoRA adapters
    reach the engines.
    """
    for judged in judge(config, config_folder):
        yield judged.line()
    if isinstance(config, PolicyRunConfig) and config.model.lora is not None:
        yield adapter_sync(config, config_folder).line()
