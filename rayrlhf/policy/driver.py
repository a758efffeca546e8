"""Driver of a policy run: check, plan, place, serve, fit, tear down."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rayrlhf.config.cautions import cautions
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import drain_in_background, make_sinks
from rayrlhf.observe.step_rows import json_line
from rayrlhf.placement.plan import plan_placement
from rayrlhf.placement.process_variables import threads_of
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.slots import Slots
from rayrlhf.placement.trainer import SlotTorchTrainer
from rayrlhf.policy.apps import run_apps
from rayrlhf.policy.critic_channel import CriticChannel
from rayrlhf.policy.critic_server import critic_loop
from rayrlhf.policy.critic_trainer import train_concurrently
from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.loop import policy_worker
from rayrlhf.policy.prompt_streams import Stores, prepare_stores, training_streams
from rayrlhf.reward.deployments import reward_app_names
from rayrlhf.reward.reading import PromptFormat
from rayrlhf.runtime.adapter_sync import adapter_sync
from rayrlhf.runtime.local_ray import LocalRay
from rayrlhf.runtime.model_checks import check_adapters, warn_invalid_generation_config
from rayrlhf.runtime.node_monitor import nodes_watched
from rayrlhf.runtime.preflight import (
    Prepared,
    check_before_ray,
    check_stops,
    try_out_environment,
    try_rewards,
    with_absolute_paths,
)
from rayrlhf.runtime.ray_session import deploy, watched
from rayrlhf.runtime.resume import check_resume, check_unchanged, select_checkpoint
from rayrlhf.runtime.run import (
    TRAIN_FOLDER,
    DriverRun,
    check_placement,
    fit,
    fitted,
    make_trainer,
    named_actor,
    placed,
    start_folder,
)
from rayrlhf.runtime.run_summary import write_summary
from rayrlhf.runtime.scratch import locked_scratch
from rayrlhf.storage.folder import run_folder
from rayrlhf.weights.backend import ROUTE_DESCRIPTIONS, weight_route
from rayrlhf.weights.store import Event, WeightStore

CRITIC_FOLDER = "critic_trainer"  # Ray Train's folder of a separate critic; its shards are in another folder


def run_policy(config: PolicyRunConfig, started: LocalRay | None = None) -> int:
    """Run a policy job; returns the exit code of `DriverRun`."""
    with DriverRun(config, started) as run:
        config = run.pinned(config)
        prepared = check_before_ray(config)
        check_resume(config)
        check_adapters(config)
        adapter_sync(config)
        config = run.check_models(config)
        with run.ray(config):
            run.finished(_train(with_absolute_paths(config), prepared, run.console))
    return run.exit_code


def _train(config: PolicyRunConfig, prepared: Prepared, console: Console) -> Path:
    """Plan, place, serve and fit; returns the run's folder."""
    for caution in cautions(config):
        console.say(f"warning: {caution}")
    config = fitted(config, plan_placement, console)
    run_path = start_folder(config)
    newest = select_checkpoint(config, console.say)
    spec = plan_placement(config)
    weight_route(config, spec, have_gpus=True)  # refuses a route that these slots do not support
    check_placement(spec, config, console)
    warn_invalid_generation_config(config.model, console.say)
    stores = prepare_stores(config, run_path, console.say)
    sampled = {"rollout": config.rollout.sampling, "eval": config.eval_sampling}
    stops = {f"{key}.sampling.stop": sampling.stop for key, sampling in sampled.items()}
    check_stops(config.model, config.data, stops)
    try_rewards(
        prepared.reward_functions,
        config.reward,
        config.data.label_key,
        stores.train,
        run_path,
        console.say,
        prompt_format=PromptFormat(config.model.path, config.data, config.model.trust_remote_code),
    )
    fixed = check_unchanged(config, newest, stores.fingerprints(), console.say)
    try_out_environment(prepared.environment, config, stores.train, console.say)
    with (
        placed(spec, config, console) as (run_id, slots, board),
        make_sinks(config, run_path, console) as sinks,
        locked_scratch(run_path, run_id),
        ExitStack() as stack,
    ):
        # Engines load model.path, whose weights are not exactly those of a policy quantized to 4 bits.
        checkpoint_version = 0 if config.model.quantization is None else -1
        _scoped_actor(
            stack,
            WeightStore,
            f"{run_id}-weights",
            checkpoint_version=checkpoint_version,
            num_engines=config.rollout.num_engines,
        )
        job = _make_job(config, run_id, stores, slots, fixed)
        if job.engines_sleep:
            slots = replace(slots, memory_turns=job.weight_store)
        trainer = make_trainer(
            partial(policy_worker, job),
            config,
            slots,
            board=job.board,
            threads=job.threads_per_worker,
            datasets=training_streams(job, stores, storage=run_folder(config.run, TRAIN_FOLDER)),
        )
        apps = run_apps(job, slots, prepared, threads=threads_of(slots, "rollout"))
        critics = f", {config.num_critic_workers} x critic" if config.critic_is_separate else ""
        console.say(
            f"starting {config.train.num_workers} x actor{critics}, {config.rollout.num_engines} x vLLM "
            f"engine, {len(apps) - 1} x reward, reference or environment"
        )
        console.say(f"weights reach the engines {ROUTE_DESCRIPTIONS[job.weight_route]}")
        if config.model.lora is not None:
            console.say(adapter_sync(config).line())
        deploy(apps)
        # Engines and trainers start concurrently; the workers' first request waits for the engines.
        stack.enter_context(drain_in_background(board, sinks))
        for watch in (
            watched(
                apps,
                timeout_seconds=config.rollout.start_timeout_seconds,
                say=console.say,
                failed=lambda what, then: sinks.write(Report("failure", 0, what, then=then)),
                give_up=trainer.abort,
            ),
            nodes_watched(
                slots,
                console,
                run_path,
                timeout_seconds=config.placement.start_timeout_seconds,
                give_up=trainer.abort,
            ),
        ):
            stack.enter_context(watch)
        if config.critic_is_separate:
            _scoped_actor(stack, CriticChannel, job.critic_channel)
            critic = _critic_trainer(job, slots)
            stack.enter_context(train_concurrently(critic, role="critic", give_up=trainer.abort))
        result = fit(trainer)
        if job.engines_sleep:
            _write_trace(job, run_path)
    write_summary(result, run_path, num_samples=config.eval.show_samples)
    return run_path


def _scoped_actor(stack: ExitStack, actor_class: type, name: str, **arguments: Any) -> None:
    """Create an actor that ends when the stack unwinds, not only when this process disconnects from Ray."""
    actor = named_actor(actor_class, name, **arguments)
    stack.callback(ray.kill, actor)


def _write_trace(job: PolicyJob, run_path: Path) -> None:
    """Write `turns.jsonl`: when engines slept and woke, and when the trainer offloaded."""
    store: Any = ray.get_actor(job.weight_store, namespace=NAMESPACE)
    events: list[Event] = ray.get(
        store.trace.remote(), timeout=job.config.rollout.weight_sync.timeout_seconds
    )
    (run_path / "turns.jsonl").write_text("".join(json_line(asdict(event)) for event in events))


def _critic_trainer(job: PolicyJob, slots: Slots) -> SlotTorchTrainer:
    return make_trainer(
        partial(critic_loop, job),
        job.config,
        slots,
        board=job.board,
        threads=job.threads_per_worker,
        datasets={},
        role="critic",
        folder=CRITIC_FOLDER,
    )


def _make_job(
    config: PolicyRunConfig, run_id: str, stores: Stores, slots: Slots, fixed: dict[str, Any]
) -> PolicyJob:
    trained = ("actor", "critic") if config.critic_is_separate else ("actor",)
    return PolicyJob(
        config=config,
        run_id=run_id,
        reward_apps=reward_app_names(config.reward, run_id),
        num_eval_prompts=stores.num_eval_prompts(config),
        # Trainers and engines alternate in a synchronous loop, so each kind may use all cores of its node.
        threads_per_worker=config.train.num_threads or threads_of(slots, *trained),
        on_gpu=slots.have_gpus,
        engines_sleep=config.engines_sleep(on_gpu=slots.have_gpus),
        weight_route=weight_route(config, slots.spec, have_gpus=slots.have_gpus),
        adapter=adapter_sync(config).adapter,
        fixed=fixed,
    )
