"""Sets up a `Run` on an actor worker: clients of the run's actors and apps, and the models' shards."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.train
from ray import serve

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.ends import ends_of
from rayrlhf.data.stream import iter_prompts
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.policy.actor_critic import (
    Actor,
    Critic,
    Ref,
    make_actor,
    make_average,
    make_critic,
    make_kl_controller,
    make_reference,
)
from rayrlhf.policy.colocation import Colocation
from rayrlhf.policy.critic_client import RemoteCritic
from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.push_check import MismatchAlarm, PushCheck
from rayrlhf.policy.rollout_pool import RolloutPool
from rayrlhf.policy.rollouts import Collector, GroupSource, Rewards, RolloutsOnDemand
from rayrlhf.policy.run_state import Run, Stream, Streams
from rayrlhf.reward.client import RewardClient, RewardSource
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.runtime.progress import Progress, start_worker
from rayrlhf.samples import Prompt
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.deepspeed_engine import gathered
from rayrlhf.train.random_states import RandomStates
from rayrlhf.train.reference import ServedReference
from rayrlhf.weights.sync import WeightSync


def set_up(job: PolicyJob) -> Run:
    """Build a `Run`: clients of the run's actors and Serve apps, and this rank's shards of the models."""
    config = job.config
    progress = start_worker(
        config, run_id=job.run_id, board=job.board, threads=job.threads_per_worker, fixed=job.fixed
    )
    ranks = progress.ranks
    weights = _weight_sync(job, ranks)
    colocation = Colocation(
        weights,
        ranks,
        engines_sleep=job.engines_sleep,
        on_gpu=job.on_gpu,
        offload_weights=config.train.offload_weights_between,
    )
    colocation.before_loading()
    critic_is_local = config.needs_critic and not config.critic_is_separate
    progress.say("loading the actor" + (" and the critic" if critic_is_local else ""))
    actor = make_actor(config)
    critic = _critic(job, progress)
    ref = _reference(job, actor)
    if config.algorithm.ema_beta is not None:
        actor.average = make_average(actor, config.algorithm.ema_beta)
    # From here on, random numbers differ per rank.
    random_states = RandomStates(config.run.seed, rank=ranks.rank, world_size=ranks.world_size)
    prompts = PromptQueue(
        rank=ranks.rank,
        per_rank=config.rollout.prompts_per_step // ranks.world_size,
        prompts_per_batch=config.rollout.prompts_per_step,
    )
    collector = _collector(job)
    combiner = RewardCombiner(config.reward, response_limit=config.rollout.max_response_tokens)
    return Run(
        config=config,
        ranks=ranks,
        progress=progress,
        streams=_streams(job, ranks),
        prompts=prompts,
        collector=collector,
        rollouts=group_source(config, prompts, collector, progress),
        rewards=Rewards(collector.rewards, combiner),
        actor=actor,
        critic=critic,
        ref=ref,
        kl=make_kl_controller(config.algorithm),
        weights=weights,
        weight_route=job.weight_route,
        adapter=job.adapter,
        colocation=colocation,
        push_check=PushCheck(config.model.path, config.rollout.weight_sync.max_logprob_jump),
        mismatch_alarm=MismatchAlarm(config.rollout.weight_sync.logprob_diff_alarm),
        random_states=random_states,
        num_eval_prompts=job.num_eval_prompts,
    )


def group_source(
    config: PolicyRunConfig, prompts: PromptQueue, collector: Collector, progress: Progress
) -> GroupSource:
    """A synchronous source, or with `rollout.max_staleness` an asynchronous one."""
    rollout = config.rollout

    def on_group(done: int) -> None:
        progress.say(f"rollout {done}/{prompts.per_rank} prompts")

    if rollout.max_staleness is None:
        return RolloutsOnDemand(
            prompts, collector, group_size=rollout.group_size, sampling=rollout.sampling, on_group=on_group
        )
    return RolloutPool(
        prompts,
        functools.partial(collector.group, group_size=rollout.group_size, sampling=rollout.sampling),
        collector.background,
        per_step=prompts.per_rank,
        max_staleness=rollout.max_staleness,
        oversampling=rollout.oversampling,
        total_steps=config.train.num_steps,
        timeout_seconds=rollout.timeout_seconds,
        on_group=on_group,
    )


def _critic(job: PolicyJob, progress: Progress) -> Critic | None:
    config = job.config
    if not config.needs_critic:
        return None
    if not config.critic_is_separate:
        return make_critic(config)
    return RemoteCritic(
        ray.get_actor(job.critic_channel, namespace=NAMESPACE),
        progress.ranks,
        steps_done=lambda: progress.state.step,
        timeout_seconds=config.train.collective_timeout_seconds,
        start_timeout_seconds=config.rollout.start_timeout_seconds,
    )


def _reference(job: PolicyJob, actor: Actor) -> Ref | None:
    if not job.config.needs_ref:
        return None
    temperature = job.config.rollout.sampling.temperature
    if not job.config.ref_is_served:
        return Ref(make_reference(job.config, actor), temperature)
    handle = serve.get_app_handle(job.ref_app)
    served = ServedReference(handle, timeout_seconds=job.config.rollout.timeout_seconds)
    return Ref(served, temperature, ThreadPoolExecutor(1, thread_name_prefix="reference"))


def _collector(job: PolicyJob) -> Collector:
    config = job.config
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


def _weight_sync(job: PolicyJob, ranks: Ranks) -> WeightSync:
    settings = job.config.rollout.weight_sync
    return WeightSync(
        ray.get_actor(job.weight_store, namespace=NAMESPACE),
        serve.get_app_handle(job.rollout_app),
        route=job.weight_route,
        rank=ranks.rank,
        device=ranks.device,
        num_engines=job.config.rollout.num_engines,
        bucket_bytes=settings.bucket_bytes,
        timeout_seconds=settings.timeout_seconds,
        start_timeout_seconds=job.config.rollout.start_timeout_seconds,
        partitioned=job.config.train.zero_stage == 3,
        gathered=gathered,
        gather=ranks.gather,
    )


def _streams(job: PolicyJob, ranks: Ranks) -> Streams:
    config = job.config

    def stream(name: str, per_step: int) -> Stream:
        per_rank = per_step // ranks.world_size
        return lambda first: iter_prompts(_shard(name), ranks.rank, per_rank, first)

    def eval_prompts() -> list[Prompt]:
        per_rank = -(-job.num_eval_prompts // ranks.world_size)
        [(_, prompts)] = list(iter_prompts(_shard("eval"), ranks.rank, per_rank, 0))
        return prompts

    ptx = config.data.ptx
    return Streams(
        train=stream("train", config.rollout.prompts_per_step),
        eval=eval_prompts,
        texts=None if ptx is None else stream("ptx", ptx.texts_per_step),
    )


def _shard(name: str) -> Any:
    return ray.train.get_dataset_shard(name)
