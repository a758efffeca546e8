"""The driver's Ray session, on an existing cluster or a local Ray, and deployment of the run's Serve apps."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import serve
from ray.data import DataContext
from ray.exceptions import ActorAlreadyExistsError
from ray.serve.api import RunTarget
from ray.serve.schema import ApplicationStatus

from rayrlhf.placement.serve_status import app_statuses
from rayrlhf.runtime.local_ray import LocalRay, is_local, local_ray
from rayrlhf.untrusted_text import last_line

POLL_SECONDS = 0.25
HEALTH_SECONDS = 2.0
SERVE_START_SECONDS = 30.0  # to find the Serve that a concurrent job has started


class DeploymentFailed(RuntimeError):
    """A Serve app did not start; the message is the deployment's."""


@contextmanager
def ray_session(namespace: str, started: LocalRay | None = None) -> Iterator[str]:
    """Join the cluster of RAY_ADDRESS (set for a submitted job), or start a local Ray that only this user can
    reach, and stop it afterwards.

    In a process where Ray already runs (a notebook, a test, or `started` by `launch`), that Ray is used and
    kept. Yields text for the console.
    """
    address = os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        if started is None and not ray.is_initialized():
            if is_local(address):
                started = stack.enter_context(local_ray(namespace))
            else:
                stack.enter_context(_joined(address, namespace))
        elif started is None:
            yield "using the Ray of this process"
            return
        for name in ("ray.serve", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        where = f"joined the cluster at {address}" if started is None else "started a local Ray"
        size = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        warnings = [] if started is None else started.warnings
        yield "\n".join([f"{where}: {size}", *(f"warning: {warning}" for warning in warnings)])


@contextmanager
def _joined(address: str | None, namespace: str) -> Iterator[None]:
    try:
        ray.init(address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()


def start_serve(**options: Any) -> None:
    """`serve.start`, or connect to the Serve of this cluster.

    Jobs that start at the same time all find none. For all but the first, Ray raises that the controller
    exists; they retry until they find it.
    """
    deadline = time.monotonic() + SERVE_START_SECONDS
    while True:
        try:
            serve.start(logging_config={"log_level": "WARNING"}, **options)
            return
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def deploy(apps: dict[str, Any]) -> None:
    """Deploy these apps (name -> bound deployment); returns before they run."""
    start_serve(proxy_location="Disabled")
    targets = [RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)


@contextmanager
def watched(
    apps: Iterable[str],
    *,
    timeout_seconds: float,
    say: Callable[[str], None],
    failed: Callable[[str, str], None],
    give_up: Callable[[], None],
) -> Iterator[None]:
    """While the body runs, wait for the apps to start, then monitor their health.

    Args:
        say: receives console lines.
        failed: called when a replica dies, with what died and how Serve reacts.
        give_up: called when an app does not start; must end the body.

    Raises:
        DeploymentFailed: with the app's own reason, whatever the body raised when it was ended.
    """
    failure: list[DeploymentFailed] = []
    stop = threading.Event()

    def watch() -> None:
        try:
            wait_for_apps(set(apps), timeout_seconds=timeout_seconds, say=say, stop=stop)
            _report_health(set(apps), say=say, failed=failed, stop=stop)
        except DeploymentFailed as error:
            failure.append(error)
            give_up()

    thread = threading.Thread(target=watch, daemon=True, name="serve-apps")
    thread.start()
    try:
        yield
    except Exception:
        if failure:
            raise failure[0] from failure[0].__cause__
        raise
    finally:
        stop.set()
        thread.join()


def wait_for_apps(
    waiting: set[str],
    *,
    timeout_seconds: float,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> None:
    """Return when all apps run, or `stop` is set. Raises `DeploymentFailed` with an app's own reason."""
    stop = stop or threading.Event()
    deadline = time.monotonic() + timeout_seconds
    while waiting and not stop.wait(POLL_SECONDS):
        statuses = app_statuses()
        for name in sorted(waiting & set(statuses)):
            app = statuses[name].app_status
            if app.status == ApplicationStatus.RUNNING:
                waiting.discard(name)
                say(f"{name.rpartition('-')[2]} is up")
            elif app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                deployments = statuses[name].deployment_statuses
                reasons = [d.message for d in deployments if d.message] or [app.message]
                raise DeploymentFailed(f"{name} did not start: {last_line(reasons[0])}") from RuntimeError(
                    reasons[0]
                )
        if waiting and time.monotonic() > deadline:
            raise DeploymentFailed(f"{', '.join(sorted(waiting))} did not start within {timeout_seconds:g} s")


def _report_health(
    apps: set[str],
    *,
    say: Callable[[str], None],
    failed: Callable[[str, str], None],
    stop: threading.Event,
) -> None:
    """Poll until `stop` is set. Serve replaces a dead replica by itself, but the user should know why it
    waits.
    """
    unhealthy: set[str] = set()
    while not stop.wait(HEALTH_SECONDS):
        statuses = app_statuses()
        for name in sorted(apps & set(statuses)):
            status = statuses[name].app_status.status
            role = name.rpartition("-")[2]
            if status == ApplicationStatus.UNHEALTHY and name not in unhealthy:
                unhealthy.add(name)
                failed(f"a replica of {role} died", "Serve starts another")
            elif status == ApplicationStatus.RUNNING and name in unhealthy:
                unhealthy.discard(name)
                say(f"{role} is complete again")
