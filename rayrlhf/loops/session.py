"""The driver's end of Ray: a cluster of its own or the one it was started on, and the run's Serve apps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.data import DataContext
from ray.serve.api import RunTarget
from ray.serve.schema import ApplicationStatus

POLL_SECONDS = 0.25


class DeploymentFailed(RuntimeError):
    """A Serve app did not come up; the message has the deployment's own words."""


@contextmanager
def ray_session(namespace: str) -> Iterator[str]:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it set), or start a local one and stop it.

    Yields a sentence for the console.
    """
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": os.cpu_count(), "include_dashboard": False}
    ray.init(**options, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    for name in ("ray.serve", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    try:
        resources = ray.cluster_resources()
        where = f"joined the cluster at {address}" if address else "started a local Ray"
        yield f"{where}: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    finally:
        ray.shutdown()


def deploy(apps: dict[str, Any], *, timeout_seconds: float, tell: Callable[[str], None]) -> None:
    """Start Serve apps (name -> bound deployment) side by side and wait until all run.

    Raises `DeploymentFailed` with the reason of the first that fails, or at the deadline.
    """
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    targets = [RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    deadline = time.monotonic() + timeout_seconds
    waiting = set(apps)
    while waiting:
        status = serve.status().applications
        for name in sorted(waiting & set(status)):
            app = status[name]
            if app.status == ApplicationStatus.RUNNING:
                waiting.discard(name)
                tell(f"{name.rpartition('-')[2]} is up")
            elif app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                reasons = [d.message for d in app.deployments.values() if d.message] or [app.message]
                raise DeploymentFailed(f"{name} did not start: {last_line(reasons[0])}")
        if waiting and time.monotonic() > deadline:
            raise DeploymentFailed(f"{', '.join(sorted(waiting))} did not start within {timeout_seconds:g} s")
        time.sleep(POLL_SECONDS)


def last_line(text: str) -> str:
    """The sentence a traceback ends with."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
