"""What a policy worker holds and does: the verbs of `loops.policy`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray import serve
from torch import nn

from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL
from rayrlhf.batch import PackedBatch, Prompt, Sample
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.stream import iter_prompts
from rayrlhf.loops.critic import Critic, LocalCritic, NoCritic
from rayrlhf.loops.evaluate import evaluate
from rayrlhf.loops.experience import MiniBatch, collect
from rayrlhf.loops.job import PolicyJob
from rayrlhf.loops.objectives import StepCounts, per_token, policy_forward, policy_objective
from rayrlhf.loops.reporting import Reporter, rollout_metrics
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.load import checkpoint_activations, load_policy, resolve_dtype
from rayrlhf.observe.metrics import Timer
from rayrlhf.placement.lease import NAMESPACE
from rayrlhf.reward.score import RewardClient, RewardFailure, RewardSource
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.rollout.weight_sync import WeightSync
from rayrlhf.train import collectives
from rayrlhf.train.checkpoint import LoopState, restore, save
from rayrlhf.train.engine import gathered
from rayrlhf.train.learner import Learner
from rayrlhf.train.reference import LocalReference, Reference, ServedReference

# Failures that a restart of the workers would only repeat: the run ends and says why.
FINAL_FAILURES = (RewardFailure, FloatingPointError)


Loop = Callable[[dict[str, PolicyJob]], dict[str, Any]]


def stops_cleanly(loop: Loop) -> Loop:
    """Turn a final failure into a result, so that Ray Train does not restart the workers for it."""

    @functools.wraps(loop)
    def wrapped(arguments: dict[str, PolicyJob]) -> dict[str, Any]:
        try:
            return loop(arguments)
        except FINAL_FAILURES as failure:
            return {"failure": f"{type(failure).__name__}: {failure}"}

    return wrapped


class PolicyWorker:
    def __init__(self, job: PolicyJob) -> None:
        self.job = job
        self.config = config = job.config
        self.algorithm = config.algorithm
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        torch.set_num_threads(job.threads_per_worker)
        torch.manual_seed(config.run.seed)
        self.state = LoopState()
        self.reporter = Reporter(job.board, self.rank)
        self.timer = Timer()
        self.metrics: dict[str, float] = {}
        self.started = time.perf_counter()
        self.say("loading the actor" + (" and the critic" if config.needs_critic else ""))
        self.actor = self._make_actor()
        self.critic: Critic = LocalCritic(config) if config.needs_critic else NoCritic()
        self.reference = self._make_reference()
        self.kl = make_kl_controller(config.algorithm)
        self.rollouts = RolloutClient(
            serve.get_app_handle(job.rollout_app), config.rollout, seed=config.run.seed
        )
        self.rewards = RewardClient(
            [RewardSource(name, weight, serve.get_app_handle(app)) for name, weight, app in job.reward_apps],
            config.reward,
        )
        self.sync = self._make_sync()
        self.last_evaluation: dict[str, Any] = {}
        self._eval_prompts: list[Prompt] | None = None

    def _make_actor(self) -> Learner:
        config, device = self.config, collectives.device()
        policy = load_policy(
            config.model, config.model.path, device=device, chunk_tokens=config.train.logprob_chunk_tokens
        )
        if config.train.gradient_checkpointing:
            checkpoint_activations(policy.causal_lm)
        dtype = resolve_dtype(config.model.dtype, device)
        return Learner(policy, config.train, lr=config.train.lr, dtype=dtype, name="actor")

    def _make_reference(self) -> Reference | None:
        config = self.config
        if not config.needs_ref:
            return None
        if config.ref is not None and config.ref.location == "serve":
            handle = serve.get_app_handle(self.job.ref_app)
            return ServedReference(handle, timeout_seconds=config.rollout.timeout_seconds)
        path = config.ref.path if config.ref is not None else None
        return LocalReference(config.model, path or config.model.path, config.train)

    def _make_sync(self) -> WeightSync:
        settings = self.config.rollout.weight_sync
        return WeightSync(
            ray.get_actor(self.job.weight_hub, namespace=NAMESPACE),
            serve.get_app_handle(self.job.rollout_app),
            rank=self.rank,
            num_engines=self.config.rollout.num_engines,
            bucket_bytes=settings.bucket_bytes,
            timeout_seconds=settings.timeout_seconds,
            gathered=gathered,
        )

    # The verbs of the loop

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one, and give its weights to the engines."""
        self.state = restore([self.actor, self.critic])
        if self.state.step:
            self.kl.load_state_dict(self.state.kl_controller)
            self.say(f"resuming after step {self.state.step}")
            self.sync.push(self.actor_parameters(), version=self.state.step)

    def prompts(self) -> Iterator[tuple[int, list[Prompt]]]:
        """(step, this rank's prompts) from where the run stands to its end."""
        if self.state.step >= self.config.train.num_steps:
            return iter(())
        per_rank = self.config.rollout.prompts_per_step // self.world_size
        shard: Any = ray.train.get_dataset_shard("train")
        return iter_prompts(shard, self.rank, per_rank, self.state.step)

    def collect(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return collect(
            prompts,
            self.rollouts,
            self.rewards,
            step=self.state.step,
            version=self.state.step,
            group_size=self.config.rollout.group_size,
            sampling=self.config.rollout.sampling,
            first_group_id=self.rank * len(prompts),
            on_group=lambda done: self.say(f"rollout {done}/{len(prompts)} prompts"),
        )

    def count_failures(self, samples: Sequence[Sample], kept: Sequence[Sample]) -> None:
        unscored = sum(sample.score is None for sample in samples)
        totals = collectives.sum_metrics(
            {
                "unscored": float(unscored),
                "dropped": float(len(samples) - len(kept)),
                "all": float(len(samples)),
            }
        )
        self.metrics["reward/failed"] = totals["dropped"]
        self.rewards.check(int(totals["unscored"]), int(totals["all"]))

    def with_inferences(self, mini_batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Old and reference log-probabilities and values, where the algorithm needs them."""
        temperature = self.config.rollout.sampling.temperature

        def infer(batches: MiniBatch) -> MiniBatch:
            fields: dict[str, Sequence[torch.Tensor] | None] = {"values": self.critic.values(batches)}
            if self._needs_old_logprobs():
                outputs = self.actor.infer(batches, policy_forward(temperature))
                fields["old_logprobs"] = [output.logprobs for output in outputs]
            if self.reference is not None:
                fields["ref_logprobs"] = self.reference.logprobs(batches, temperature)
            known = {name: tensors for name, tensors in fields.items() if tensors is not None}
            return [
                batch.with_fields(**{name: tensors[i] for name, tensors in known.items()})
                for i, batch in enumerate(batches)
            ]

        return self.per_mini_batch(mini_batches, infer)

    def _needs_old_logprobs(self) -> bool:
        """One update per batch starts at the old policy itself: its first forward pass gives the old log-
        probs.
        """
        single_update = self.algorithm.updates_per_batch * self.algorithm.mini_batches == 1
        kl_in_reward = self.reference is not None and self.algorithm.kl_in == "reward"
        return kl_in_reward or not single_update

    @staticmethod
    def per_mini_batch(
        mini_batches: Sequence[MiniBatch], change: Callable[[MiniBatch], list[PackedBatch]]
    ) -> list[MiniBatch]:
        """Apply `change` to all micro-batches of the step at once and cut the result into mini-batches
        again.
        """
        changed = iter(change([batch for batches in mini_batches for batch in batches]))
        return [[next(changed) for _ in batches] for batches in mini_batches]

    def update_actor(self, batches: MiniBatch, counts: StepCounts, *, step: int) -> dict[str, float]:
        if step < self.algorithm.critic_warmup_steps:
            return {}
        objective = policy_objective(
            self.algorithm,
            counts,
            kl_coef=self.kl.coef,
            constant_length=float(self.config.rollout.sampling.max_new_tokens),
        )
        forward = policy_forward(self.config.rollout.sampling.temperature)
        return per_token(self.actor.update(batches, forward, objective, step=step), counts)

    def actor_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The actor's parameters under their names in a Hugging Face checkpoint."""
        return list(self.actor.module.causal_lm.named_parameters())

    def adapt_kl(self, *, num_samples: int) -> None:
        if "kl/mean" in self.metrics:
            self.kl.update(self.metrics["kl/mean"], num_samples * self.world_size)
        self.state.kl_controller = self.kl.state_dict()

    def is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0

    def is_last(self) -> bool:
        return self.state.step == self.config.train.num_steps

    def save(self) -> None:
        with self.phase("checkpoint"):
            self._keep_time()
            save(self.state, [self.actor, self.critic], Path(self.config.run.path) / "scratch")

    def evaluate(self, when: str) -> None:
        """Held-out prompts; the evaluation before the first step is kept for the summary."""
        if not self.job.num_eval_prompts:
            return
        if self._eval_prompts is None:
            per_rank = -(-self.job.num_eval_prompts // self.world_size)
            shard: Any = ray.train.get_dataset_shard("eval")
            [(_, self._eval_prompts)] = list(iter_prompts(shard, self.rank, per_rank, 0))
        with self.phase("eval"):
            result = evaluate(
                self._eval_prompts,
                self.rollouts,
                self.rewards,
                self.config,
                num_prompts=self.job.num_eval_prompts,
                version=self.state.step,
            )
        kept = {"metrics": result.metrics, "rows": result.rows}
        if when == "before":
            self.state.eval_before = kept
        self.last_evaluation = kept
        self.reporter.evaluation(self.state.step, when, result.metrics, result.rows)

    def finish(self) -> dict[str, Any]:
        """The evaluation after the last step, the export, and what the summary is made of."""
        self.last_evaluation = {}
        self.evaluate("after")
        export = self._export() if self.config.checkpoint.export else None
        self._keep_time()
        return {
            "before": self.state.eval_before,
            "after": self.last_evaluation,
            "steps": self.state.step,
            "seconds_per_phase": self.state.seconds_per_phase,
            "seconds_total": self.state.seconds_total,
            "export": export,
        }

    def _export(self) -> str:
        path = Path(self.config.run.path) / "export"
        with self.phase("export"):
            causal_lm = self.actor.module.causal_lm
            state = self.actor.state_dict(causal_lm, on_this_rank=self.rank == 0)
            if self.rank == 0:
                tokenizer = prompt_tokenizer(
                    self.config.model.path,
                    self.config.model.trust_remote_code,
                    read_chat_template(self.config.data),
                )
                export_causal_lm(causal_lm, state, tokenizer, path)
        return str(path)

    # Telling what happens

    def say(self, text: str) -> None:
        self.reporter.say(self.state.step, text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say(name.replace("_", " "))
        with self.timer(name):
            yield

    def report(
        self, samples: Sequence[Sample], kept: Sequence[Sample], mini_batches: Sequence[MiniBatch]
    ) -> None:
        """The step's metrics and a few of its rollouts. Collective."""
        seconds = self.timer.drain()
        self.state.add_seconds(seconds)
        metrics = self.metrics | seconds | {"kl/coef": self.kl.coef}
        metrics |= rollout_metrics(samples, kept, seconds, retries=self.rollouts.drain_retries())
        metrics["data/micro_batches"] = float(sum(map(len, mini_batches)))
        metrics["train/tokens_per_second"] = (
            metrics["data/tokens"]
            * self.algorithm.updates_per_batch
            / max(seconds.get("time/update_actor", 0.0) + seconds.get("time/update_critic", 0.0), 1e-9)
        )
        self.metrics = {}
        for source, what in self.rewards.drain_failures().items():
            self.reporter.warn(self.state.step, f"reward source {source}: {what}")
        failed = [sample for sample in samples if sample.score is None]  # all: a lost sample has a name
        self.reporter.step(
            self.state.step, metrics, [*failed, *kept[: self.config.observe.rollouts_per_step]]
        )

    def _keep_time(self) -> None:
        """Move what the clocks hold into the state that a resumed run goes on from."""
        self.state.add_seconds(self.timer.drain())
        now = time.perf_counter()
        self.state.seconds_total += now - self.started
        self.started = now


def make_kl_controller(algorithm: Any) -> FixedKL | AdaptiveKL:
    if algorithm.kl_controller == "adaptive":
        return AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
    return FixedKL(algorithm.kl_coef)
