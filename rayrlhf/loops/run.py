"""The driver of a policy run: check, plan, place, serve, fit, tear down."""

from __future__ import annotations

# First: it sets what Ray reads when it is imported.
from rayrlhf.loops.driver import (
    TRAIN_FOLDER,
    check_placement,
    drive,
    fit,
    make_trainer,
    named_actor,
    placed,
    start_folder,
    threads_each,
)

# isort: split

from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray

from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.loops.apps import run_apps
from rayrlhf.loops.checks import (
    Prepared,
    check_before_ray,
    try_out_environment,
    try_rewards,
    with_absolute_paths,
)
from rayrlhf.loops.job import PolicyJob, reward_app_names
from rayrlhf.loops.policy import policy_loop
from rayrlhf.loops.policy_async import async_policy_loop
from rayrlhf.loops.session import deploy, watched
from rayrlhf.loops.streams import Stores, prepare_stores, training_streams
from rayrlhf.loops.summary import write_summary
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import drain_in_background, make_sinks
from rayrlhf.placement.plan import plan_placement
from rayrlhf.rollout.weight_sync import WeightHub


def run_policy(config: PolicyRunConfig) -> int:
    """Run to the end; the exit code is `drive`'s."""
    return drive(config, _check)


def _check(config: PolicyRunConfig) -> Callable[[Console], Path]:
    return partial(_run, with_absolute_paths(config), check_before_ray(config))


def _run(config: PolicyRunConfig, prepared: Prepared, console: Console) -> Path:
    run_path = start_folder(config)
    spec = plan_placement(config)
    check_placement(spec, config)
    stores = prepare_stores(config, run_path, console.say)
    try_rewards(prepared.reward_functions, config.reward, config.data.label_key, stores.train)
    try_out_environment(prepared.environment, config, stores.train)
    with (
        placed(spec, config, console) as (run_id, slots, board),
        make_sinks(config, run_path, console) as sinks,
    ):
        hub = named_actor(WeightHub, f"{run_id}-weights")
        job = _make_job(config, run_id, stores)
        trainer = make_trainer(
            policy_loop if config.rollout.max_staleness is None else async_policy_loop,
            job,
            config,
            slots,
            threads=job.threads_per_worker,
            datasets=training_streams(job, stores, storage=run_path / TRAIN_FOLDER),
        )
        apps = run_apps(job, slots, prepared, threads=threads_each(config.rollout.num_engines))
        console.say(
            f"starting {config.train.num_workers} x trainer, {config.rollout.num_engines} x vLLM engine, "
            f"{len(apps) - 1} x reward, reference or environment"
        )
        deploy(apps)
        # Engines and trainer come up side by side; the workers' first request waits for the engines.
        up = watched(
            apps,
            timeout_seconds=config.rollout.start_timeout_seconds,
            tell=console.say,
            give_up=trainer.abort,
        )
        try:
            with drain_in_background(board, sinks), up:
                result = fit(trainer)
        finally:
            ray.kill(hub)
    write_summary(result, run_path, num_samples=config.eval.show_samples)
    return run_path


def _make_job(config: PolicyRunConfig, run_id: str, stores: Stores) -> PolicyJob:
    return PolicyJob(
        config=config,
        run_id=run_id,
        reward_apps=reward_app_names(config.reward, run_id),
        num_eval_prompts=stores.num_eval_prompts(config),
        # Trainers and engines take turns in a synchronous loop, so each kind may use all cores of its node.
        threads_per_worker=config.train.num_threads or threads_each(config.train.num_workers),
    )
