"""`Run`: the state and methods that `loop.policy_loop` uses on an actor worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrlhf.algorithms.kl import KLController
from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.config.model import CriticConfig, LoraConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.policy.actor_critic import (
    Actor,
    Critic,
    Ref,
)
from rayrlhf.policy.actor_export import export_actor
from rayrlhf.policy.batches import Packing, TextStream
from rayrlhf.policy.colocation import Colocation
from rayrlhf.policy.critic_client import critic_folder
from rayrlhf.policy.evaluate import evaluate
from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.push_check import MismatchAlarm, PushCheck
from rayrlhf.policy.report import rollout_metrics
from rayrlhf.policy.rollouts import Collector, GroupSource, Rewards, StepGroups
from rayrlhf.rollout.engine_settings import engine_dtype
from rayrlhf.runtime.progress import Progress
from rayrlhf.runtime.results import RunResult
from rayrlhf.samples import Prompt, Sample
from rayrlhf.storage.folder import stored
from rayrlhf.train.checkpoint import Saved
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.random_states import RandomStates
from rayrlhf.weights.sync import WeightSync

# (first prompt batch or step) -> iterator of (number, this rank's prompts) from there on
Stream = Callable[[int], Iterator[tuple[int, list[Prompt]]]]


@dataclass
class Streams:
    """This rank's prompts, from Ray Data."""

    train: Stream
    eval: Callable[[], list[Prompt]]
    texts: Stream | None = None  # data.ptx


@dataclass
class Run:
    """A policy run on one rank. Every method is collective."""

    config: PolicyRunConfig
    ranks: Ranks
    progress: Progress
    streams: Streams
    prompts: PromptQueue
    collector: Collector
    rollouts: GroupSource
    rewards: Rewards
    actor: Actor
    critic: Critic | None  # None if the estimator uses none
    ref: Ref | None  # None without a KL term
    kl: KLController
    weights: WeightSync
    weight_route: str
    colocation: Colocation
    push_check: PushCheck
    mismatch_alarm: MismatchAlarm
    random_states: RandomStates
    num_eval_prompts: int = 0  # 0: no evaluation
    adapter: LoraConfig | None = None  # that pushes send alone; None: they send all weights
    texts: TextStream | None = None  # PPO-ptx, set by `steps`
    step_metrics: dict[str, float] = field(default_factory=dict)  # of the current step
    eval_prompts: list[Prompt] | None = None  # read at the first evaluation
    refused_connections: int = 0  # of the weight transfer, already reported

    # Constants of the algorithm

    @property
    def groups_per_step(self) -> int:
        return self.config.rollout.prompts_per_step

    @property
    def packing(self) -> Packing:
        config = self.config
        return Packing(
            num_mini_batches=config.algorithm.mini_batches,
            full_batch=config.rollout.prompts_per_step * config.rollout.group_size,
            budget_tokens=config.train.max_tokens_per_micro_batch,
            seed=config.run.seed,
            share_prefixes=config.train.share_prefixes,
        )

    @property
    def longest_response(self) -> float:
        return float(self.config.rollout.max_response_tokens)

    @property
    def value_clip(self) -> float | None:
        return (self.config.critic or CriticConfig()).value_clip

    @property
    def old_actor(self) -> Actor | None:
        """The actor if old log-probabilities must be computed before the updates; None if there is a single
        update per batch, whose forward pass gives them.
        """
        algorithm = self.config.algorithm
        single_update = algorithm.updates_per_batch * algorithm.mini_batches == 1
        kl_in_reward = self.ref is not None and algorithm.kl_in == "reward"
        return self.actor if kl_in_reward or not single_update else None

    # The life of the run

    @property
    def saved(self) -> Sequence[Saved]:
        """The parts of a checkpoint, in save and load order."""
        models = [self.actor] if self.critic is None else [self.actor, self.critic]
        return [*models, self.prompts, self.random_states]

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one, and push its weights if engines may hold others.

        Engines hold other weights even without a checkpoint, if workers have died before the first one.
        """
        self.progress.restore(self.saved)
        state = self.progress.state
        if state.step:
            self.kl.load_state_dict(state.kl_controller)
            self.rewards.combiner.load_state_dict(state.reward_normalizers)
        if self.weights.needs_push(state.step):
            self.push_weights(version=state.step)

    def steps(self) -> Iterator[int]:
        """Connect the data and iterate over the remaining steps."""
        state = self.progress.state
        if not self.progress.is_last():
            self.prompts.connect(self.streams.train(state.first_prompt_batch))
            if self.streams.texts is not None:
                self.texts = TextStream(
                    self.streams.texts(state.step),
                    self.ranks,
                    coef=self.config.algorithm.ptx_coef,
                    budget_tokens=self.config.train.max_tokens_per_micro_batch,
                )
        yield from self.progress.steps()

    def start_training(self) -> None:
        """Called before the weights change."""
        self.weights.weights_change()
        if self.colocation.engines_sleep:
            with self.progress.phase("engines_sleep"):
                self.colocation.start_training(self.actor, self.critic, self.ref)
            freed = {"rollout/freed_bytes": float(self.colocation.freed_bytes)}
            self.step_metrics |= self.ranks.sum_numbers(freed)

    def end_training(
        self, metrics: Metrics, samples: Sequence[Sample], balance: dict[str, float], *, step: int
    ) -> None:
        """Update the KL coefficient, and compare the engines' log-probabilities with the trainer's.

        Raises:
            WeightsDiffer: on all ranks, before anything of this step is saved.
        """
        self.step_metrics |= balance
        results = metrics.results()
        if "kl/mean" in results:
            self.kl.update(results["kl/mean"], int(balance["data/samples"]))
        difference = results.get("rollout/logprob_diff_mean")
        if difference is not None:
            stale = sum(version < step for sample in samples for version in sample.policy_versions)
            is_stale = self.ranks.max(float(stale)) > 0
            self.push_check = self.push_check.after(difference, policy_version=step, is_stale=is_stale)
            self.mismatch_alarm, said = self.mismatch_alarm.after(difference, is_stale=is_stale)
            if said is not None:
                self.progress.reporter.warn(step, said)

    def push_weights(self, version: int) -> None:
        """Push the weights as `version`, the number of completed steps; the engines are awake afterwards."""
        self.progress.state.step = version
        models = self.actor, self.critic, self.ref
        problem = self.colocation.start_rollouts(lambda: self._push(version), *models)
        refused = self.weights.num_refused_connections()
        self.step_metrics["rollout/weight_sync_fallbacks"] = float(problem is not None)
        self.step_metrics["rollout/refused_connections"] = float(refused)
        reporter = self.progress.reporter
        if refused > self.refused_connections:
            reporter.warn(
                version,
                f"{refused - self.refused_connections} connections without this run's keys were refused at "
                "the weight transfer's port: another process scans it (docs/security.md)",
            )
        self.refused_connections = refused
        if problem is not None:
            reporter.warn(
                version,
                f"{self.weight_route} failed, the weights were sent through the object store: {problem}",
            )

    def _push(self, version: int) -> str | None:
        if self.adapter is None:
            every = self.config.rollout.weight_sync.verify
            verify = every is not None and version % every == 0
            return self.weights.push(self.actor.weights(), version, verify=verify)
        on_gpu = self.ranks.device.type == "cuda"
        dtype = engine_dtype(self.config.model, self.config.rollout, on_gpu=on_gpu)
        # Engines load model.path, whose weights are not exactly those of a policy quantized to 4 bits.
        base = None if self.config.model.quantization is None else self.actor.base_weights()
        return self.weights.push_adapter(
            self.actor.adapter(), version, rank=self.adapter.rank, dtype=dtype, base=base
        )

    def end_step(self, groups: StepGroups, samples: Sequence[Sample], metrics: Metrics) -> None:
        """Report the step; evaluate and save a checkpoint if due."""
        progress = self.progress
        is_empty = groups.num_groups == 0
        if is_empty:
            progress.reporter.warn(progress.state.step - 1, f"no group to train on: {self._why_empty()}")
        self.step_metrics["rollout/empty_steps"] = float(is_empty)
        self.step_metrics |= groups.metrics | ({} if is_empty else metrics.results())
        self._report(groups.sampled, samples)
        self.step_metrics = {}
        if progress.is_due(self.config.eval.every_steps) and not progress.is_last():
            self.evaluate("during")
        if progress.checkpoint_is_due() or progress.is_last():
            self._save()

    def _why_empty(self) -> str:
        if self.config.algorithm.dynamic_sampling is None:
            return "too many samples could not be scored"
        return "algorithm.dynamic_sampling keeps no group: raw rewards are all equal or out of its range"

    def _report(self, sampled: Sequence[Sample], trained: Sequence[Sample]) -> None:
        progress = self.progress
        seconds = progress.step_seconds()
        metrics = self.step_metrics | seconds | {"kl/coef": self.kl.coef}
        metrics |= rollout_metrics(
            sampled,
            trained,
            seconds,
            self.ranks,
            step=progress.state.step - 1,
            retries=self.collector.rollouts.drain_retries(),
        )
        metrics |= self.rewards.combiner.source_means(sampled, self.ranks.sum_tensor)
        if self.config.rollout.max_staleness is not None:
            restarted = float(self.rollouts.drain_restarted())
            metrics |= self.ranks.sum_numbers({"rollout/restarted_groups": restarted})
        spent = seconds.get("time/update_actor", 0.0) + seconds.get("time/update_critic", 0.0)
        trained_tokens = metrics.get("data/tokens", 0.0) * self.config.algorithm.updates_per_batch
        metrics["train/tokens_per_second"] = trained_tokens / spent if spent else 0.0
        for source, what in self.rewards.client.drain_failures().items():
            progress.reporter.warn(progress.state.step, f"reward source {source}: {what}")
        if self.weights.drain_store_restarts():
            text = "the weight store's process died; the trainers have restored its state"
            progress.reporter.warn(progress.state.step, text)
        failed = [
            sample for sample in sampled if sample.score is None
        ]  # all of them, so that each is reported
        shown = trained[: self.config.observe.rollouts_per_step]
        progress.reporter.step(progress.state.step, metrics, [*failed, *shown])

    def _save(self) -> None:
        state = self.progress.state
        with self.progress.phase("checkpoint"):
            state.kl_controller = self.kl.state_dict()
            state.reward_normalizers = self.rewards.combiner.state_dict()
            state.first_prompt_batch = int(self.ranks.min(self.prompts.next_batch))
            elsewhere = [critic_folder(state.step)] if self.config.critic_is_separate else []
            self.progress.save(self.saved, elsewhere)

    def evaluate(self, when: str) -> dict[str, Any]:
        """Evaluate on held-out prompts: metrics and rows, empty without such prompts. "before" runs only
        before the run's first step and is kept for the summary.
        """
        state = self.progress.state
        if not self.num_eval_prompts or (when == "before" and state.step > 0):
            return {}
        if self.eval_prompts is None:
            self.eval_prompts = self.streams.eval()
        with self.progress.phase("eval"):
            result = evaluate(
                self.eval_prompts,
                self.collector,
                self.rewards,
                self.config,
                self.ranks,
                num_prompts=self.num_eval_prompts,
                version=state.step,
            )
        evaluation = {"metrics": result.metrics, "rows": result.rows}
        if when == "before":
            state.eval_before = evaluation
        self.progress.reporter.evaluation(state.step, when, result.metrics, result.rows)
        if when != "before":
            self._keep_if_best(result.metrics["eval/reward_mean"])
        return evaluation

    def _keep_if_best(self, reward: float) -> None:
        """Export the actor to `best/` if this evaluation is the best so far; all ranks have equal numbers."""
        state = self.progress.state
        if state.best and reward <= state.best["reward"]:
            return
        state.best = {"step": state.step, "reward": reward}
        if self.config.checkpoint.best and self.config.eval.every_steps is not None:
            self._export("best")

    def finish(self) -> RunResult:
        """Evaluate after the last step and export; returns the result for the summary."""
        self.rollouts.close()
        after = self.evaluate("after")
        export = self._export("export") if self.config.checkpoint.export else None
        if self.critic is not None:
            self.critic.close()
        self.weights.close()
        return self.progress.result(after=after, export=export)

    def _export(self, name: str) -> str:
        path = Path(self.config.run.path) / name
        with self.progress.phase("export"):
            export_actor(self.actor, self.config, path)
            return stored(self.config.run, name, write=self.ranks.rank == 0)
