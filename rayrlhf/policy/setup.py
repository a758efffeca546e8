"""What a policy worker holds and does: the verbs of `policy.loop` and `policy.loop_async`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import serve

from rayrlhf.algorithms.advantages import ADVANTAGES
from rayrlhf.data.ends import ends_of
from rayrlhf.data.stream import iter_prompts
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.policy.actor_critic import Learners
from rayrlhf.policy.advantages import with_group_advantages
from rayrlhf.policy.colocation import Turns
from rayrlhf.policy.critic_client import RemoteCritic, critic_folder
from rayrlhf.policy.dynamic_sampling import count_groups, first_groups, informative, scored_groups
from rayrlhf.policy.evaluate import evaluate
from rayrlhf.policy.export import export_actor
from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.push_check import PushCheck
from rayrlhf.policy.rollout_pool import RolloutsAhead
from rayrlhf.policy.rollouts import Collector
from rayrlhf.policy.texts import TextStream
from rayrlhf.reward.client import RewardClient, RewardSource
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.runtime.reporting import rollout_metrics
from rayrlhf.runtime.worker import TrainingWorker
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train import collectives
from rayrlhf.train.checkpoint import Saved, restore
from rayrlhf.train.engine import gathered
from rayrlhf.train.reference import ServedReference
from rayrlhf.weights.sync import WeightSync


class PolicyWorker(TrainingWorker):
    def __init__(self, job: PolicyJob) -> None:
        super().__init__(
            job.config, run_id=job.run_id, board=job.board, threads=job.threads_per_worker, fixed=job.fixed
        )
        self.job = job
        self.config = config = job.config
        self.algorithm = config.algorithm
        self.sync = self._make_sync()
        self.push_check = PushCheck(config.model.path, config.rollout.weight_sync.max_logprob_jump)
        self.strangers = 0  # refused at the weight transfer, as far as they have been reported
        self.turns = Turns(self.sync, engines_sleep=config.engines_sleep)
        self.turns.before_loading()
        beside = config.needs_critic and not config.critic_is_apart
        self.say("loading the actor" + (" and the critic" if beside else ""))
        self.learners = Learners(config, reference=self._served_reference(), critic=self._remote_critic())
        self.random_states = self.own_random_states()
        self.collector = self._make_collector()
        self.combiner = RewardCombiner(config.reward, response_limit=config.rollout.max_response_tokens)
        self.queue = PromptQueue(
            rank=self.rank,
            per_rank=config.rollout.prompts_per_step // self.world_size,
            prompts_per_draw=config.rollout.prompts_per_step,
        )
        self.texts: TextStream | None = None
        self.ahead: RolloutsAhead | None = None
        self.sampled: list[Sample] = []  # of this step, dropped ones included
        self.trained: list[Sample] = []  # those of them that were trained on
        self.metrics: dict[str, float] = {}  # of this step, beside the learners'
        self.last_evaluation: dict[str, Any] = {}
        self._eval_prompts: list[Prompt] | None = None

    def _served_reference(self) -> ServedReference | None:
        if not self.config.ref_is_served:
            return None
        handle = serve.get_app_handle(self.job.ref_app)
        return ServedReference(handle, timeout_seconds=self.config.rollout.timeout_seconds)

    def _remote_critic(self) -> RemoteCritic | None:
        if not self.config.critic_is_apart:
            return None
        return RemoteCritic(
            ray.get_actor(self.job.mailbox, namespace=NAMESPACE),
            timeout_seconds=self.config.train.collective_timeout_seconds,
            start_timeout_seconds=self.config.rollout.start_timeout_seconds,
        )

    def _make_collector(self) -> Collector:
        config, job = self.config, self.job
        episodes = serve.get_app_handle(job.environment_app) if config.rollout.environment else None
        rollouts = RolloutClient(
            serve.get_app_handle(job.rollout_app),
            config.rollout,
            seed=config.run.seed,
            ends_of=ends_of(config.model, config.data),
            episodes=episodes,
        )
        sources = [
            RewardSource(name, weight, serve.get_app_handle(app) if app else None)
            for name, weight, app in job.reward_apps
        ]
        return Collector(rollouts, RewardClient(sources, config.reward))

    def _make_sync(self) -> WeightSync:
        settings = self.config.rollout.weight_sync
        return WeightSync(
            ray.get_actor(self.job.weight_hub, namespace=NAMESPACE),
            serve.get_app_handle(self.job.rollout_app),
            route=self.job.weight_route,
            rank=self.rank,
            device=collectives.device(),
            num_engines=self.config.rollout.num_engines,
            bucket_bytes=settings.bucket_bytes,
            timeout_seconds=settings.timeout_seconds,
            gathered=gathered,
            gather=collectives.gather_lists,
        )

    # The verbs of the loops

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one, and see to it that the engines hold its weights.

        Without one, engines hold newer weights than ours when workers have died before the first checkpoint.
        """
        self.state = restore(self.saved)
        if self.state.step:
            self.learners.kl.load_state_dict(self.state.kl_controller)
            self.combiner.load_state_dict(self.state.reward_normalizers)
            self.announce(f"resuming after step {self.state.step}")
        if self.sync.is_news(self.state.step):
            self.push_weights(version=self.state.step)

    def steps(self) -> Iterator[int]:
        """The steps from where the run stands to its end, with their data connected."""
        if not self.is_last():
            budget = self.config.train.max_tokens_per_micro_batch
            per_rank = self.queue.per_rank
            self.queue.connect(iter_prompts(_shard("train"), self.rank, per_rank, self.state.first_draw))
            if self.config.data.ptx is not None:
                per_rank = self.config.data.ptx.texts_per_step // self.world_size
                texts = iter_prompts(_shard("ptx"), self.rank, per_rank, self.state.step)
                self.texts = TextStream(texts, budget_tokens=budget)
        yield from self.count_steps()

    def collect_draw(self) -> list[Sample]:
        """The next draw of prompts, sampled by the newest weights and scored; waits for all of it."""
        prompts = self.queue.take(self.queue.per_rank)
        samples = self.collector.collect(
            prompts,
            version=self.state.step,
            group_size=self.config.rollout.group_size,
            sampling=self.config.rollout.sampling,
            on_group=self._say_progress,
        )
        self.queue.finish(group_id for group_id, _ in prompts)
        return samples

    def start_rollouts_ahead(self) -> None:
        rollout = self.config.rollout
        assert rollout.max_staleness is not None
        self.ahead = RolloutsAhead(
            self.queue,
            functools.partial(self.collector.group, group_size=rollout.group_size, sampling=rollout.sampling),
            self.collector.background,
            per_step=self.queue.per_rank,
            max_staleness=rollout.max_staleness,
            oversampling=rollout.oversampling,
            timeout_seconds=rollout.timeout_seconds,
        )

    def take_draw(self) -> list[Sample]:
        """A draw from the pool of rollouts in flight, which is filled up again first."""
        assert self.ahead is not None
        remaining = self.config.train.num_steps - self.state.step
        return self.ahead.draw(self.state.step, remaining, on_group=self._say_progress)

    def enough_groups(self, draw: Callable[[], list[Sample]]) -> list[Sample]:
        """This rank's samples to train on: one draw, or with dynamic sampling as many as it takes."""
        dynamic = self.algorithm.dynamic_sampling
        needs_group = ADVANTAGES[self.algorithm.advantage].needs_group
        wanted = self.config.rollout.prompts_per_step
        kept: list[Sample] = []
        self.sampled, num_scored, num_draws = [], 0, 0
        while num_draws < (dynamic.max_draws if dynamic else 1) and count_groups(kept) < wanted:
            samples = self.combiner.combine(draw(), collectives.sum_over_ranks)
            scored = scored_groups(samples, needs_group=needs_group)
            kept += self._informative(scored) if dynamic else scored
            self.sampled += samples
            num_scored += len(scored)
            num_draws += 1
        self._count_failures(num_scored)
        if dynamic is not None:
            self.metrics["rollout/draws"] = float(num_draws)
            self.metrics["rollout/groups_in_range"] = float(count_groups(kept))
            kept = first_groups(kept, wanted)
        return with_group_advantages(kept, self.algorithm.advantage)

    def _informative(self, scored: Sequence[Sample]) -> list[Sample]:
        dynamic = self.algorithm.dynamic_sampling
        assert dynamic is not None
        raw_reward = functools.partial(self.combiner.raw_reward, source=dynamic.source)
        return informative(scored, dynamic, raw_reward)

    def _count_failures(self, num_scored: int) -> None:
        unscored = sum(sample.score is None for sample in self.sampled)
        totals = collectives.sum_metrics(
            {
                "unscored": float(unscored),
                "dropped": float(len(self.sampled) - num_scored),
                "unverified": float(self.collector.rewards.drain_unverified()),
                "all": float(len(self.sampled)),
            }
        )
        self.metrics["reward/failed"] = totals["dropped"]
        self.metrics["reward/unverified"] = totals["unverified"]
        self.collector.rewards.check(int(totals["unscored"]), int(totals["all"]))

    def learn(self, samples: Sequence[Sample], step: int) -> None:
        """Update critic and actor; a step whose samples were all dropped is counted and learns nothing."""
        texts = self.texts.take() if self.texts is not None else []
        nothing = count_groups(samples) == 0
        self.metrics["rollout/empty_steps"] = float(nothing)
        if nothing:
            self.reporter.warn(step, f"nothing to learn: {self._why_nothing()}")
        else:
            if self.config.engines_sleep:
                with self.phase("engines_sleep"):
                    self.turns.train(self.learners)
                freed = {"rollout/freed_bytes": float(self.turns.freed_bytes)}
                self.metrics |= collectives.sum_metrics(freed)
            self.learners.learn(samples, step, self.phase, texts=texts)
            self._check_push(samples, step)
        self.learners.finish_step(step)
        self.state.step = step + 1
        self.trained = list(samples)

    def _why_nothing(self) -> str:
        if self.algorithm.dynamic_sampling is None:
            return "too many samples could not be scored"
        return "algorithm.dynamic_sampling keeps no group: raw rewards are all equal or out of its range"

    def _check_push(self, samples: Sequence[Sample], step: int) -> None:
        """Raises `WeightsDiffer`, on all ranks and before anything of this step is saved."""
        difference = self.learners.metrics.get("rollout/logprob_diff_mean")
        if difference is None:
            return
        stale = sum(version < step for sample in samples for version in sample.policy_versions)
        self.push_check = self.push_check.after(
            difference, policy_version=step, is_stale=collectives.max_over_ranks(float(stale)) > 0
        )

    def push_weights(self, version: int) -> None:
        """The engines hold `version` then, and are awake."""
        weights = self.learners.actor_weights()
        problem = self.turns.roll_out(self.learners, lambda: self.sync.push(weights, version))
        self.metrics["rollout/weight_sync_fallbacks"] = float(problem is not None)
        strangers = self.sync.strangers()
        self.metrics["rollout/refused_connections"] = float(strangers)
        if strangers > self.strangers:
            count = strangers - self.strangers
            self.reporter.warn(
                version,
                f"{count} connections without this run's keys were refused at the weight transfer's port: "
                "somebody else scans it (docs/security.md)",
            )
        self.strangers = strangers
        if problem is not None:
            route = self.job.weight_route
            self.reporter.warn(version, f"{route} did not bring the weights, the object store did: {problem}")

    def end_step(self) -> None:
        """Report; evaluate and save where it is due."""
        self._report()
        if self.is_due(self.config.eval.every_steps) and not self.is_last():
            self.evaluate("during")
        if self.checkpoint_is_due() or self.is_last():
            self.save()

    @property
    def saved(self) -> Sequence[Saved]:
        return [self.learners, self.queue, self.random_states]

    def save(self) -> None:
        with self.phase("checkpoint"):
            self.state.kl_controller = self.learners.kl.state_dict()
            self.state.reward_normalizers = self.combiner.state_dict()
            self.state.first_draw = int(-collectives.max_over_ranks(-self.queue.next_draw))
            apart = self.config.critic_is_apart
            self.save_state(elsewhere=[critic_folder(self.config, self.state.step)] if apart else [])

    def evaluate_before(self) -> None:
        if self.state.step == 0:
            self.evaluate("before")

    def evaluate(self, when: str) -> None:
        """Held-out prompts; the evaluation before the first step is kept for the summary."""
        if not self.job.num_eval_prompts:
            return
        if self._eval_prompts is None:
            per_rank = -(-self.job.num_eval_prompts // self.world_size)
            [(_, self._eval_prompts)] = list(iter_prompts(_shard("eval"), self.rank, per_rank, 0))
        with self.phase("eval"):
            result = evaluate(
                self._eval_prompts,
                self.collector,
                self.combiner,
                self.config,
                num_prompts=self.job.num_eval_prompts,
                version=self.state.step,
            )
        kept = {"metrics": result.metrics, "rows": result.rows}
        if when == "before":
            self.state.eval_before = kept
        self.last_evaluation = kept
        self.reporter.evaluation(self.state.step, when, result.metrics, result.rows)
        self._keep_if_best(when, result.metrics["eval/reward_mean"])

    def _keep_if_best(self, when: str, reward: float) -> None:
        """`best/` holds the actor of the best evaluation so far; every rank has the same numbers."""
        best = self.state.best
        if when == "before" or (best and reward <= best["reward"]):
            return
        self.state.best = {"step": self.state.step, "reward": reward}
        if self.config.checkpoint.best and self.config.eval.every_steps is not None:
            self._export("best")

    def finish(self) -> dict[str, Any]:
        """The evaluation after the last step, the export, and what the summary is made of."""
        if self.ahead is not None:
            self.ahead.close()
        self.last_evaluation = {}
        self.evaluate("after")
        export = self._export("export") if self.config.checkpoint.export else None
        self.learners.critic.close()
        self.sync.close()
        return self.result(after=self.last_evaluation, export=export)

    def _export(self, name: str) -> str:
        path = Path(self.config.run.path) / name
        with self.phase("export"):
            export_actor(self.learners, self.config, path)
        return str(path)

    # Telling what happens

    def _say_progress(self, done: int) -> None:
        self.say(f"rollout {done}/{self.queue.per_rank} prompts")

    def _report(self) -> None:
        """The step's metrics and a few of its rollouts. Collective."""
        seconds = self.step_seconds()
        metrics = self.metrics | self.learners.metrics | seconds | {"kl/coef": self.learners.kl.coef}
        metrics |= rollout_metrics(
            self.sampled,
            self.trained,
            seconds,
            step=self.state.step - 1,
            retries=self.collector.rollouts.drain_retries(),
        )
        metrics |= self.combiner.source_means(self.sampled, collectives.sum_over_ranks)
        if self.ahead is not None:
            restarted = float(self.ahead.drain_restarted())
            metrics |= collectives.sum_metrics({"rollout/restarted_groups": restarted})
        spent = seconds.get("time/update_actor", 0.0) + seconds.get("time/update_critic", 0.0)
        trained_tokens = metrics.get("data/tokens", 0.0) * self.algorithm.updates_per_batch
        metrics["train/tokens_per_second"] = trained_tokens / spent if spent else 0.0
        self.metrics, self.learners.metrics = {}, {}
        for source, what in self.collector.rewards.drain_failures().items():
            self.reporter.warn(self.state.step, f"reward source {source}: {what}")
        if self.sync.drain_hub_deaths():
            self.reporter.warn(self.state.step, "the weight hub's process died; it has its state again")
        failed = [sample for sample in self.sampled if sample.score is None]  # all: a lost sample has a name
        shown = self.trained[: self.config.observe.rollouts_per_step]
        self.reporter.step(self.state.step, metrics, [*failed, *shown])


def _shard(name: str) -> Any:
    return ray.train.get_dataset_shard(name)
