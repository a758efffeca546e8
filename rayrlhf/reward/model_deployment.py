"""Served reward models: a Serve replica, and an actor on its slot that holds the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from rayrlhf.config.reward import ModelSource
from rayrlhf.placement.memory_turns import loading_turn
from rayrlhf.placement.replica import SlotChild
from rayrlhf.placement.serve_status import failed_starts, health_check_period
from rayrlhf.placement.slots import Slots
from rayrlhf.reward.batching import Batcher
from rayrlhf.reward.items import Failure, ScoreItem
from rayrlhf.reward.reading import PromptFormat

# Samples per call of the model, which splits them into forward passes by their tokens.
MAX_BATCH = 256


class ScoreActor:
    """One reward model."""

    def __init__(self, source: ModelSource, prompt_format: PromptFormat | None) -> None:
        from rayrlhf.reward.reward_model import RewardModel  # imports torch, transformers: not in the replica

        self.model = RewardModel(source, prompt_format)
        # Ray may run each call on another of its thousand threads, and torch keeps memory and OpenMP workers
        # for each thread that it has run in.
        self.thread = ThreadPoolExecutor(1, "score")

    def ready(self) -> bool:
        return True

    def score(self, items: list[ScoreItem]) -> list[float | Failure]:
        return self.thread.submit(self.model.score, items).result()


class ModelReward:
    """Serve replica in front of one reward model."""

    ACTOR: type[ScoreActor] = ScoreActor

    async def __init__(
        self, role: str, source: ModelSource, prompt_format: PromptFormat | None, slots: Slots
    ) -> None:
        async with loading_turn(slots, role, serve.get_replica_context().rank.rank):
            self.model = SlotChild(
                role,
                self.ACTOR,
                source,
                prompt_format,
                slots=slots,
                env_vars={"TOKENIZERS_PARALLELISM": "false"},
                timeout_seconds=600,
            )
            await self.model.call("ready", timeout_seconds=600)
        # One batch at a time: two concurrent ones would only alternate on the model.
        self.batcher = Batcher[ScoreItem, float | Failure](self._score_batch, max_batch=MAX_BATCH)

    async def score(self, items: list[ScoreItem]) -> list[float | Failure]:
        return await self.batcher.ask(items)

    async def _score_batch(self, items: list[ScoreItem]) -> list[float | Failure]:
        return await self.model.call("score", items)

    async def check_health(self) -> None:
        await self.model.call("ready")


def model_deployment(source: ModelSource, *, role: str, prompt_format: PromptFormat, slots: Slots) -> Any:
    return replica_deployment(ModelReward, source, (role, source, prompt_format, slots))


def replica_deployment(replica: type[ModelReward], source: ModelSource, arguments: tuple[Any, ...]) -> Any:
    deployment = serve.deployment(replica).options(
        name="reward",
        num_replicas=source.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=health_check_period(source.num_replicas, least=5),
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(source.num_replicas),
    )
    return deployment.bind(*arguments)
