"""Rollout engines behind Serve, deployed as a run deploys them, for a process that measures them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import serve

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.placement.plan import plan_placement
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.serve_status import app_statuses
from rayrlhf.placement.slots import create_slots
from rayrlhf.policy.apps import max_model_tokens
from rayrlhf.policy.job import PolicyJob
from rayrlhf.rollout.engine import EngineSettings, rollout_deployment
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.runtime.ray_session import deploy, ray_session, watched
from rayrlhf.weights.store import WeightStore

START_SECONDS = 300.0


class Engines(NamedTuple):
    handle: Any  # of the deployment
    store: Any  # the weight store's actor
    config: PolicyRunConfig


def read_config(path: Path) -> PolicyRunConfig:
    return PolicyRunConfig.model_validate(json.loads(path.read_text()))


def settings_of(config: PolicyRunConfig, threads: int, weight_store: str | None) -> EngineSettings:
    return engine_settings(
        config.model,
        config.rollout,
        seed=config.run.seed,
        max_model_tokens=max_model_tokens(config),
        weight_store=weight_store,
        on_gpu=False,
        threads=threads,
    )


@contextmanager
def running_engines(config: PolicyRunConfig, threads: int) -> Iterator[Engines]:
    """All of them up; removed on exit, with the Ray that they run in."""
    with ray_session(NAMESPACE):
        job = PolicyJob(config, f"rayrlhf-{config.run.name}", (), 0, threads)
        slots = create_slots(
            plan_placement(config), gpus_per_slot=0, run_id=config.run.name, timeout_seconds=START_SECONDS
        )
        store: Any = (
            ray.remote(WeightStore).options(name=job.weight_store, namespace=NAMESPACE, num_cpus=0).remote()
        )
        app = rollout_deployment(
            settings_of(config, threads, job.weight_store),
            slots,
            num_engines=config.rollout.num_engines,
            max_requests=config.rollout.max_concurrent_requests,
        )
        deploy({job.rollout_app: app})
        with watched(
            [job.rollout_app], timeout_seconds=START_SECONDS, say=print, failed=print, give_up=lambda: None
        ):
            while app_statuses()[job.rollout_app].app_status.status != "RUNNING":
                time.sleep(0.2)
            yield Engines(serve.get_app_handle(job.rollout_app), store, config)
        serve.delete(job.rollout_app)
        slots.remove()
