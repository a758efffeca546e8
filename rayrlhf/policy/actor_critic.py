"""The models that learn and the reference they are held to: the algorithm once the samples are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from rayrlhf.algorithms.advantages import ADVANTAGES
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, KLController
from rayrlhf.batch import PackedBatch
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.checkpoint_tensors import CheckpointTensors, checkpoint_tensors
from rayrlhf.models.load import adapt, checkpoint_activations, load_policy, resolve_dtype
from rayrlhf.policy.advantages import add_advantages
from rayrlhf.policy.batches import MiniBatch, share_out
from rayrlhf.policy.critic import Critic, LocalCritic, NoCritic
from rayrlhf.policy.losses import (
    StepCounts,
    language_model_objective,
    policy_forward,
    policy_objective,
)
from rayrlhf.policy.step_metrics import UpdateMetrics, update_metrics
from rayrlhf.samples import Sample
from rayrlhf.train import collectives
from rayrlhf.train.ema import ExponentialMovingAverage
from rayrlhf.train.engine import loading
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.reference import AdaptersOff, LocalReference, Reference
from rayrlhf.train.sequence_parallel import share_sequences

Phase = Callable[[str], AbstractContextManager[None]]


class Learners:
    """Actor, critic, reference and KL controller of one rank; every method is collective."""

    def __init__(
        self, config: PolicyRunConfig, *, reference: Reference | None = None, critic: Critic | None = None
    ) -> None:
        """`reference` and `critic` are those that live elsewhere, where they do."""
        self.config = config
        self.algorithm = config.algorithm
        self.temperature = config.rollout.sampling.temperature
        self.actor = _make_actor(config)
        self.critic = critic or (LocalCritic(config) if config.needs_critic else NoCritic())
        self.reference = reference
        if reference is None and config.needs_ref:
            self.reference = self._local_reference()
        self.kl = make_kl_controller(config.algorithm)
        self.average = (
            ExponentialMovingAverage(self.actor.module.causal_lm, config.algorithm.ema_beta)
            if config.algorithm.ema_beta is not None
            else None
        )
        self.metrics: dict[str, float] = {}  # of the step, until the worker reports them

    def _local_reference(self) -> Reference:
        if self.config.ref_is_the_actor:
            return AdaptersOff(self.actor)
        path = self.config.ref.path if self.config.ref is not None else None
        return LocalReference(self.config.model, path or self.config.model.path, self.config.train)

    def learn(
        self, samples: Sequence[Sample], step: int, phase: Phase, *, texts: Sequence[PackedBatch] = ()
    ) -> None:
        """One step of the algorithm on scored samples of all ranks: critic, then actor, `updates_per_batch`
        passes over `mini_batches` optimizer steps. `texts`, all of them, are in the objective of each
        (PPO-ptx). A mini-batch without a token to learn takes no optimizer step: AdamW would move the weights
        by its moments alone.
        """
        with phase("logprobs"):
            mini_batches = self._prepare(samples, step)
        measured, num_empty = UpdateMetrics(), 0
        for _ in range(self.algorithm.updates_per_batch):
            for batches in mini_batches:
                counts = StepCounts.of(batches)  # of all ranks, which therefore agree
                if counts.tokens == 0:
                    num_empty += 1
                    continue
                with phase("update_critic"):
                    critic_metrics = self.critic.start_update(batches, counts, step=step)
                with phase("update_actor"):
                    measured += self._update_actor(batches, counts, texts, step=step)
                with phase("update_critic"):
                    measured += critic_metrics()
        self.metrics |= measured.result() | {"data/empty_mini_batches": float(num_empty)}
        if "kl/mean" in self.metrics:
            self.kl.update(self.metrics["kl/mean"], int(self.metrics["data/samples"]))

    def _prepare(self, samples: Sequence[Sample], step: int) -> list[MiniBatch]:
        """Balanced, packed, with old and reference log-probabilities, values and advantages."""
        if ADVANTAGES[self.algorithm.advantage].needs_group:
            assert all(sample.group_advantage is not None for sample in samples)
        shared = share_out(
            samples,
            num_mini_batches=self.algorithm.mini_batches,
            full_batch=self.config.rollout.prompts_per_step * self.config.rollout.group_size,
            budget_tokens=self.config.train.max_tokens_per_micro_batch,
            seed=self.config.run.seed,
            step=step,
        )
        self.metrics |= shared.metrics
        mini_batches = _per_mini_batch(shared.mini_batches, self._with_inferences)
        return _per_mini_batch(
            mini_batches, lambda batches: add_advantages(batches, self.algorithm, kl_coef=self.kl.coef)
        )

    def _with_inferences(self, batches: MiniBatch) -> list[PackedBatch]:
        values = self.critic.start_values(batches)
        fields: dict[str, Sequence[torch.Tensor] | None] = {}
        if self._needs_old_logprobs():
            outputs = self.actor.infer(batches, policy_forward(self.temperature))
            fields["old_logprobs"] = [output.logprobs for output in outputs]
        if self.reference is not None:
            fields["ref_logprobs"] = self.reference.logprobs(batches, self.temperature)
        fields["values"] = values()
        known = {name: tensors for name, tensors in fields.items() if tensors is not None}
        return [
            batch.with_fields(**{name: tensors[i] for name, tensors in known.items()})
            for i, batch in enumerate(batches)
        ]

    def _needs_old_logprobs(self) -> bool:
        """One update per batch starts at the old policy: its first forward pass gives the old log-probs."""
        single_update = self.algorithm.updates_per_batch * self.algorithm.mini_batches == 1
        kl_in_reward = self.reference is not None and self.algorithm.kl_in == "reward"
        return kl_in_reward or not single_update

    def _update_actor(
        self, batches: MiniBatch, counts: StepCounts, texts: Sequence[PackedBatch], *, step: int
    ) -> UpdateMetrics:
        if step < self.algorithm.critic_warmup_steps:
            return UpdateMetrics()
        objective = policy_objective(
            self.algorithm,
            counts,
            kl_coef=self.kl.coef,
            constant_length=float(self.config.rollout.max_response_tokens),
        )
        terms = [Term(batches, policy_forward(self.temperature), objective)]
        if texts:
            num_tokens = StepCounts.of(list(texts)).tokens
            text_loss = language_model_objective(self.algorithm.ptx_coef, num_tokens)
            terms.append(Term(texts, policy_forward(temperature=1.0), text_loss))
        measured = self.actor.update(*terms, step=step)
        if self.average is not None:
            self.average.update()
        return update_metrics(measured, counts, name="actor", aggregation=self.algorithm.aggregation)

    def finish_step(self, step: int) -> None:
        """Whether or not there was something to learn in it."""
        self.critic.finish_step(step)

    def actor_weights(self) -> Iterator[CheckpointTensors]:
        """The actor's weights in the names and layouts of a Hugging Face checkpoint."""
        return checkpoint_tensors(self.actor.module.causal_lm)

    def offload(self) -> None:
        """Leave the devices to the engines, but for the weights that these are to be given."""
        self.actor.offload()
        self.critic.offload()

    def reload(self) -> None:
        self.actor.reload()
        self.critic.reload()

    def save(self, folder: Path) -> None:
        self.actor.save(folder)
        self.critic.save(folder)
        if self.average is not None:
            self.average.save(folder)

    def load(self, folder: Path) -> None:
        self.actor.load(folder)
        self.critic.load(folder)
        if self.average is not None:
            self.average.load(folder)


def _make_actor(config: PolicyRunConfig) -> Learner:
    device = collectives.device()
    dtype = resolve_dtype(config.model.dtype, device)
    with loading(config.train, dtype, in_parts=config.model.loads_in_parts):
        policy = load_policy(
            config.model, config.model.path, device=device, chunk_tokens=config.train.logprob_chunk_tokens
        )
    adapt(config.model, policy.causal_lm, device=device, seed=config.run.seed)
    if config.train.gradient_checkpointing:
        checkpoint_activations(policy.causal_lm)
    share_sequences(policy, config.model, config.train)
    return Learner(
        policy,
        config.train,
        lr=config.train.lr,
        dtype=dtype,
        name="actor",
        first_step=config.algorithm.critic_warmup_steps,
    )


def make_kl_controller(algorithm: AlgorithmConfig) -> KLController:
    if algorithm.kl_controller == "adaptive":
        assert algorithm.kl_target is not None  # the config insists on it
        return AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
    return FixedKL(algorithm.kl_coef)


def _per_mini_batch(
    mini_batches: Sequence[MiniBatch], change: Callable[[MiniBatch], list[PackedBatch]]
) -> list[MiniBatch]:
    """Apply `change` to all micro-batches of the step at once and cut the result into mini-batches again."""
    changed: Any = iter(change([batch for batches in mini_batches for batch in batches]))
    return [[next(changed) for _ in batches] for batches in mini_batches]
