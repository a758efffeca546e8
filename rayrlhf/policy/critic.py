"""The critic as the policy loop sees it: beside the actor in the same workers, or not there at all.

A third one is in `policy.critic_client`: in a trainer of its own. Calls are started and their results fetched
apart, so that such a critic works while the actor does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.value_loss import explained_variance_sums
from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import CriticConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.load import adapt, checkpoint_activations, load_critic, resolve_dtype
from rayrlhf.policy.losses import StepCounts, value_forward, value_objective
from rayrlhf.policy.step_metrics import UpdateMetrics, update_metrics
from rayrlhf.train import collectives
from rayrlhf.train.engine import loading
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.sequence_parallel import share_sequences


class Critic(Protocol):
    def start_values(self, batches: Sequence[PackedBatch]) -> Callable[[], list[Tensor] | None]: ...

    def start_update(
        self, batches: list[PackedBatch], counts: StepCounts, *, step: int
    ) -> Callable[[], UpdateMetrics]: ...

    def finish_step(self, step: int) -> None: ...

    def offload(self) -> None: ...

    def reload(self) -> None: ...

    def close(self) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class NoCritic:
    """For estimators that take their baseline from elsewhere."""

    def start_values(self, batches: Sequence[PackedBatch]) -> Callable[[], None]:
        return lambda: None

    def start_update(
        self, batches: list[PackedBatch], counts: StepCounts, *, step: int
    ) -> Callable[[], UpdateMetrics]:
        return UpdateMetrics

    def finish_step(self, step: int) -> None:
        pass

    def offload(self) -> None:
        pass

    def reload(self) -> None:
        pass

    def close(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass


class LocalCritic:
    """A second DeepSpeed engine in the actor's workers: one failure domain, one checkpoint."""

    def __init__(self, config: PolicyRunConfig) -> None:
        critic = config.critic or CriticConfig()
        self.algorithm = config.algorithm
        self.clip = critic.value_clip
        self.constant_length = float(config.rollout.max_response_tokens)
        device = collectives.device()
        dtype = resolve_dtype(config.model.dtype, device)
        with loading(config.train, dtype, in_parts=config.model.loads_in_parts):
            model = load_critic(config.model, critic.path or config.model.path, device=device)
        adapt(config.model, model.decoder, device=device, seed=config.run.seed)
        if config.train.gradient_checkpointing:
            checkpoint_activations(model.decoder)
        share_sequences(model, config.model, config.train)
        self.learner = Learner(
            model,
            config.train,
            lr=critic.lr,
            dtype=dtype,
            name="critic",
        )

    def start_values(self, batches: Sequence[PackedBatch]) -> Callable[[], list[Tensor]]:
        values = self.learner.infer(batches, value_forward)
        return lambda: values

    def start_update(
        self, batches: list[PackedBatch], counts: StepCounts, *, step: int
    ) -> Callable[[], UpdateMetrics]:
        metrics = self._update(batches, counts, step)
        return lambda: metrics

    def finish_step(self, step: int) -> None:
        pass

    def _update(self, batches: list[PackedBatch], counts: StepCounts, step: int) -> UpdateMetrics:
        objective = value_objective(
            self.algorithm, counts, clip=self.clip, constant_length=self.constant_length
        )
        measured = self.learner.update(Term(batches, value_forward, objective), step=step)
        sums = [explained_variance_sums(_of(b.values), _of(b.returns), b.loss_mask) for b in batches]
        returns = collectives.sum_over_ranks(torch.stack(sums).sum(0).cpu())
        return update_metrics(
            measured,
            counts,
            name="critic",
            aggregation=self.algorithm.aggregation,
            returns=tuple(returns.tolist()),
        )

    def offload(self) -> None:
        self.learner.offload()

    def reload(self) -> None:
        self.learner.reload()

    def close(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
