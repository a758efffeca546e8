"""A policy run in one process: the real loop, models, optimizer and scores; an engine of torch, no Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.rollout import SamplingConfig
from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.policy.actor_critic import Ref, make_actor, make_critic, make_kl_controller, make_reference
from rayrlhf.policy.colocation import Colocation
from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.push_check import MismatchAlarm, PushCheck
from rayrlhf.policy.rollouts import Collector, Rewards
from rayrlhf.policy.run_state import Run, Streams
from rayrlhf.policy.setup import group_source
from rayrlhf.reward.client import RewardClient
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.runtime.progress import Checkpoints, Progress
from rayrlhf.samples import Prompt, Sample
from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train.checkpoint import LoopState, Saved
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.random_states import RandomStates
from tests.samples import make_config

RESPONSE_TOKENS = 6
FIRST_BYTE = 8  # the tiny model's tokens below it are special
Score = Callable[[Sequence[int]], float]  # of response ids


def share_of_low_bytes(response_ids: Sequence[int]) -> float:
    """A reward that a policy without context can learn to raise: about a half at first."""
    return sum(token < 136 for token in response_ids) / len(response_ids)


class Engine:
    """Samples from its own copy of the weights, which `push` replaces."""

    def __init__(self, config: PolicyRunConfig) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
        self.version = 0
        self.pushed: list[int] = []
        self.min_versions: list[int] = []

    def push(self, weights: Iterable[CheckpointTensors], version: int, *, verify: bool = False) -> None:
        state = {
            spec.name: tensor.clone()
            for made_together in weights
            for spec, tensor in zip(made_together.specs, made_together.tensors(), strict=True)
        }
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and missing in ([], ["lm_head.weight"]), "all but the tied head"
        self.version = version
        self.pushed.append(version)

    @torch.no_grad()
    def generate(self, prompt: Prompt, group_id: int, index: int, temperature: float) -> Sample:
        generator = torch.Generator().manual_seed(1000 * group_id + index)
        ids, logprobs = list(prompt.prompt_ids), []
        for _ in range(RESPONSE_TOKENS):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            of_tokens = (logits / temperature).log_softmax(-1)
            token = int(torch.multinomial(of_tokens.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(of_tokens[token]))
        response = ids[len(prompt.prompt_ids) :]
        return Sample(
            group_id=group_id,
            sample_index=index,
            prompt=prompt,
            response_ids=response,
            response="",
            rollout_logprobs=logprobs,
            loss_mask=[1] * len(response),
            policy_versions=[self.version] * len(response),
            truncated=False,
        )


class Rollouts:
    """In place of `RolloutClient`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def samples(
        self, prompt: Prompt, *, group_id: int, group_size: int, min_version: int, sampling: SamplingConfig
    ) -> AsyncIterator[Sample]:
        self.engine.min_versions.append(min_version)
        for index in range(group_size):
            yield self.engine.generate(prompt, group_id, index, sampling.temperature)

    def drain_retries(self) -> int:
        return 0


class Scorer(RewardClient):
    """One source, called in this process."""

    def __init__(self, config: PolicyRunConfig, score: Score) -> None:
        super().__init__([], config.reward)
        self.score_of = score

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        return [replace(sample, source_rewards=(self.score_of(sample.response_ids),)) for sample in samples]


class Weights:
    """In place of `WeightSync`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def needs_push(self, version: int) -> bool:
        return version > 0

    def push(self, weights: Iterable[CheckpointTensors], version: int, *, verify: bool = False) -> None:
        self.engine.push(weights, version)

    def num_refused_connections(self) -> int:
        return 0

    def weights_change(self) -> None: ...

    def drain_store_restarts(self) -> int:
        return 0

    def close(self) -> None:
        pass


@dataclass
class Reports:
    """In place of `Reporter`: keeps what it is given."""

    steps: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def say(self, step: int, text: str) -> None:
        pass

    event = say

    def warn(self, step: int, text: str) -> None:
        self.warnings.append(f"{step}: {text}")

    def step(self, step: int, metrics: dict[str, float], shown: Sequence[Sample]) -> None:
        self.steps.append(metrics)

    def flush(self) -> None:
        pass


class NoCheckpoints(Checkpoints):
    """Nothing is restored, and nothing is saved."""

    def restore(self, saved: Sequence[Saved]) -> LoopState:
        return LoopState()

    def node_to_be_reclaimed(self) -> str | None:
        return None

    def save(self, state: LoopState, saved: Sequence[Saved], elsewhere: Sequence[str]) -> None:
        pass


def config_of(model: str, folder: Path, /, **sections: Any) -> PolicyRunConfig:
    changes = {
        "run": {"name": "loop", "dir": str(folder)},
        "model": {"path": model, "dtype": "float32"},
        "data": {"train": "prompts.jsonl", "max_prompt_tokens": 16},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 6,
            "sampling": {"max_new_tokens": RESPONSE_TOKENS},
        },
        "train": {"num_steps": 3, "lr": 1e-3, "max_tokens_per_micro_batch": 128, "warmup_steps": 0},
        "checkpoint": {"export": False},
    }
    merged = {name: {**changes.get(name, {}), **sections.get(name, {})} for name in changes | sections}
    return make_config(**merged)


def run_of(
    config: PolicyRunConfig,
    score: Score = share_of_low_bytes,
    *,
    engine_of: Callable[[PolicyRunConfig], Engine] | None = None,
    client: RewardClient | None = None,
    batches: Callable[[int, int], Iterator[tuple[int, list[Prompt]]]] | None = None,
) -> tuple[Run, Engine, Reports]:
    """A run that is set up by hand, as `setup.set_up` does under Ray."""
    torch.manual_seed(config.run.seed)
    ranks, reports, engine = Ranks(), Reports(), (engine_of or Engine)(config)
    checkpoints = NoCheckpoints(LocalFolder(Path("nowhere")), Path("nowhere"))
    progress = Progress(config, ranks, reports, checkpoints)  # pyright: ignore[reportArgumentType]
    actor = make_actor(config)
    critic = make_critic(config) if config.needs_critic else None
    ref = Ref(make_reference(config, actor), actor.temperature) if config.needs_ref else None
    prompts_per_step = config.rollout.prompts_per_step
    prompts = PromptQueue(rank=0, per_rank=prompts_per_step, prompts_per_batch=prompts_per_step)
    client = client or Scorer(config, score)
    batches = batches or prompt_batches
    collector = Collector(Rollouts(engine), client)  # pyright: ignore[reportArgumentType]
    combiner = RewardCombiner(config.reward, response_limit=RESPONSE_TOKENS)
    weights: Any = Weights(engine)
    run = Run(
        config=config,
        ranks=ranks,
        progress=progress,
        streams=Streams(train=lambda first: batches(first, prompts_per_step), eval=list),
        prompts=prompts,
        collector=collector,
        rollouts=group_source(config, prompts, collector, progress),
        rewards=Rewards(client, combiner),
        actor=actor,
        critic=critic,
        ref=ref,
        kl=make_kl_controller(config.algorithm),
        weights=weights,
        weight_route="object_store",
        colocation=Colocation(weights, ranks, engines_sleep=False, on_gpu=False),
        push_check=PushCheck(config.model.path, config.rollout.weight_sync.max_logprob_jump),
        mismatch_alarm=MismatchAlarm(config.rollout.weight_sync.logprob_diff_alarm),
        random_states=RandomStates(config.run.seed, rank=0, world_size=1),
    )
    return run, engine, reports


def prompt_batches(first: int, size: int) -> Iterator[tuple[int, list[Prompt]]]:
    number = first
    while True:
        rows = range(number * size, (number + 1) * size)
        yield number, [Prompt(row, [1, FIRST_BYTE + row % 200, FIRST_BYTE + 7], "") for row in rows]
        number += 1
