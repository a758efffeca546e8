"""The models of a policy run on one rank: the actor, a critic in the same workers, and the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, KLController
from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, PolicyBatch, ValueBatch, pack_values
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.model import CriticConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.adapters import AdapterMatrix, adapter_matrices
from rayrlhf.models.checkpoint_tensors import CheckpointTensors, checkpoint_tensors
from rayrlhf.models.experts import Replay, moe_layers
from rayrlhf.models.load import adapt, checkpoint_activations, load_critic, load_policy, resolve_dtype
from rayrlhf.policy.batches import MiniBatch, map_over_step
from rayrlhf.policy.losses import (
    PolicyObjective,
    ValueObjective,
    policy_forward,
    value_forward,
)
from rayrlhf.train import collectives
from rayrlhf.train.deepspeed_engine import loading
from rayrlhf.train.ema import ExponentialMovingAverage
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.reference import AdaptersOff, LocalReference, Reference
from rayrlhf.train.sequence_parallel import set_sequence_group

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Pending(Protocol[Result_co]):
    """Result of a call to a separate model, which may still be running."""

    def result(self) -> Result_co: ...


@dataclass(frozen=True)
class Done(Generic[Result]):
    value: Result

    def result(self) -> Result:
        return self.value


class Actor:
    """The policy and, with `algorithm.ema_beta`, the moving average of its weights. Collective."""

    def __init__(
        self,
        learner: Learner,
        *,
        temperature: float,
        average: ExponentialMovingAverage | None = None,
    ) -> None:
        """`temperature`: of sampling, and therefore of the log-probabilities."""
        self.learner = learner
        self.temperature = temperature
        self.average = average

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Log-probabilities [T] of each micro-batch's tokens."""
        return [out.logprobs for out in self.learner.infer(batches, policy_forward(self.temperature))]

    def update(
        self, batches: Sequence[PolicyBatch], objective: PolicyObjective, texts: Term | None, *, step: int
    ) -> Metrics:
        """One optimizer step on a mini-batch and, for PPO-ptx, on `texts`."""
        terms = [Term(batches, policy_forward(self.temperature), objective)]
        if texts is not None:
            terms.append(texts)
        weight = objective.counts.of_mean(objective.algorithm.aggregation)
        metrics = self.learner.update(*terms, step=step, weight=weight)
        if self.average is not None:
            self.average.update()
        return metrics

    def weights(self) -> Iterator[CheckpointTensors]:
        """The weights in the names and layouts of a Hugging Face checkpoint."""
        return checkpoint_tensors(self.learner.module.causal_lm)

    def base_weights(self) -> Iterator[CheckpointTensors]:
        """Like `weights`, without the LoRA adapters."""
        return checkpoint_tensors(self.learner.module.causal_lm, adapters=False)

    def adapter(self) -> Iterator[AdapterMatrix]:
        """The LoRA adapters' matrices."""
        return adapter_matrices(self.learner.module.causal_lm)

    def offload(self) -> None:
        """Free the device for the engines, except for the weights, which are pushed to them next."""
        self.learner.offload()

    def offload_weights(self) -> None:
        """Free the device of the weights, too, after they were pushed."""
        self.learner.offload_weights()

    def reload(self) -> None:
        self.learner.reload()

    def save(self, folder: Path) -> None:
        self.learner.save(folder)
        if self.average is not None:
            self.average.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)
        if self.average is not None:
            self.average.load(folder)


@dataclass(frozen=True)
class Ref:
    """The frozen reference policy, at the sampling temperature."""

    model: Reference
    temperature: float
    thread: Executor | None = None  # of a served one, which computes while the actor does

    def offload(self) -> None:
        """A reference has nothing but weights."""

    def offload_weights(self) -> None:
        if isinstance(self.model, LocalReference):
            self.model.offload_weights()

    def reload(self) -> None:
        if isinstance(self.model, LocalReference):
            self.model.reload()

    def start_logprobs(self, batches: Sequence[PackedBatch]) -> Pending[list[Tensor]]:
        """Log-probabilities [T] of each micro-batch's tokens."""
        if self.thread is None:
            return Done(self.model.logprobs(batches, self.temperature))
        return self.thread.submit(self.model.logprobs, batches, self.temperature)


class Critic(Protocol):
    """A critic in the actor's workers (`LocalCritic`) or in a separate trainer
    (`critic_client.RemoteCritic`).

    A separate one computes concurrently with the actor, so calls return `Pending` results.
    """

    def start_values(self, batches: Sequence[PackedBatch]) -> Pending[list[Tensor]]:
        """Values [T] of each micro-batch."""
        ...

    def start_update(
        self, batches: Sequence[PolicyBatch], objective: ValueObjective, *, step: int
    ) -> Pending[Metrics]:
        """One optimizer step on a mini-batch with values and returns."""
        ...

    def offload(self) -> None: ...

    def offload_weights(self) -> None: ...

    def reload(self) -> None: ...

    def close(self) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class LocalCritic:
    """A second DeepSpeed engine in the actor's workers: one failure domain, one checkpoint."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        return self.learner.infer(batches, value_forward)

    def update(self, batches: Sequence[ValueBatch], objective: ValueObjective, *, step: int) -> Metrics:
        weight = objective.counts.of_mean(objective.algorithm.aggregation)
        return self.learner.update(Term(batches, value_forward, objective), step=step, weight=weight)

    def start_values(self, batches: Sequence[PackedBatch]) -> Pending[list[Tensor]]:
        return Done(self.values(batches))

    def start_update(
        self, batches: Sequence[PolicyBatch], objective: ValueObjective, *, step: int
    ) -> Pending[Metrics]:
        return Done(self.update([value_batch(batch) for batch in batches], objective, step=step))

    def offload(self) -> None:
        self.learner.offload()

    def offload_weights(self) -> None:
        self.learner.offload_weights()

    def reload(self) -> None:
        self.learner.reload()

    def close(self) -> None:
        """Nothing to close."""

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)


def value_batch(batch: PolicyBatch) -> ValueBatch:
    """The fields of a micro-batch with returns that the critic reads."""
    assert batch.values is not None and batch.returns is not None
    return pack_values(batch, batch.values, batch.returns)


def infer(
    mini_batches: Sequence[MiniBatch], actor: Actor | None, ref: Ref | None, critic: Critic | None
) -> list[MiniBatch]:
    """Add old log-probabilities, reference log-probabilities and values to the step's mini-batches, for the
    models that are given: separate ones while the actor computes. Collective.
    """

    def inferred(batches: MiniBatch) -> list[PolicyBatch]:
        none: Pending[list[None]] = Done([None] * len(batches))
        values = critic.start_values(batches) if critic is not None else none
        reference = ref.start_logprobs(batches) if ref is not None else none
        old = actor.logprobs(batches) if actor is not None else none.result()
        return [
            replace(batch, old_logprobs=o, ref_logprobs=r, values=v)
            for batch, o, r, v in zip(batches, old, reference.result(), values.result(), strict=True)
        ]

    return map_over_step(mini_batches, inferred)


def make_actor(config: PolicyRunConfig) -> Actor:
    device = collectives.device()
    dtype = resolve_dtype(config.model.dtype, device)
    with loading(config.train, dtype, in_parts=config.model.loads_in_parts):
        policy = load_policy(
            config.model, config.model.path, device=device, chunk_tokens=config.train.logprob_chunk_tokens
        )
    adapt(config.model, policy.causal_lm, device=device, seed=config.run.seed)
    if config.rollout.router_replay:
        policy.replay = Replay(moe_layers(policy))
    if config.train.gradient_checkpointing:
        checkpoint_activations(policy.causal_lm, offload=config.train.activation_offload)
    set_sequence_group(policy, config.model, config.train)
    learner = Learner(
        policy,
        config.train,
        lr=config.train.lr,
        dtype=dtype,
        name="actor",
        first_step=config.algorithm.critic_warmup_steps,
        aux_loss_coef=config.model.aux_loss_coef,
        saves_optimizer=config.checkpoint.optimizer,
    )
    return Actor(learner, temperature=config.rollout.sampling.temperature)


def make_average(actor: Actor, beta: float) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(actor.learner.module.causal_lm, beta)


def make_critic(config: PolicyRunConfig) -> LocalCritic:
    critic = config.critic or CriticConfig()
    device = collectives.device()
    dtype = resolve_dtype(config.model.dtype, device)
    with loading(config.train, dtype, in_parts=config.model.loads_in_parts):
        model = load_critic(config.model, critic.path or config.model.path, device=device)
    adapt(config.model, model.decoder, device=device, seed=config.run.seed)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model.decoder, offload=config.train.activation_offload)
    set_sequence_group(model, config.model, config.train)
    learner = Learner(
        model,
        config.train,
        lr=critic.lr,
        dtype=dtype,
        name="critic",
        aux_loss_coef=config.model.aux_loss_coef,
        saves_optimizer=config.checkpoint.optimizer,
    )
    return LocalCritic(learner)


def make_reference(config: PolicyRunConfig, actor: Actor) -> Reference:
    """A reference in the actor's workers: the actor without its adapters, or a frozen copy."""
    if config.ref_is_the_actor:
        return AdaptersOff(actor.learner)
    path = config.ref.path if config.ref is not None else None
    return LocalReference(config.model, path or config.model.path, config.train)


def make_kl_controller(algorithm: AlgorithmConfig) -> KLController:
    if algorithm.kl_controller == "adaptive":
        assert algorithm.kl_target is not None  # the config requires it
        return AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
    return FixedKL(algorithm.kl_coef)
