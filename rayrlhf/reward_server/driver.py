"""Driver of the reward server: validate, place, serve over HTTP until a signal arrives, tear down."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.api import RunTarget
from ray.util.placement_group import PlacementGroup

from rayrlhf.config.serve_reward import ServedModel, ServeRewardConfig
from rayrlhf.observe.console import Console
from rayrlhf.placement.plan import PlacementSpec, Units, place, slots_in_words
from rayrlhf.placement.reaper import NAMESPACE, delete_apps, start_reaper
from rayrlhf.placement.serve_status import app_statuses
from rayrlhf.placement.slots import PlacementError, Slots, create_slots, resolve_gpus_per_slot
from rayrlhf.reward_server.deployment import Served, server_app
from rayrlhf.reward_server.http import answers, authorization, check_own_port, read_token, url_of
from rayrlhf.reward_server.source_checks import check_sources
from rayrlhf.runtime.file_checks import check_files
from rayrlhf.runtime.hub_models import fetch_here, fetch_on_nodes, pin, shared_access
from rayrlhf.runtime.process_environment import set_process_environment
from rayrlhf.runtime.ray_session import DeploymentFailed, ray_session, start_serve, wait_for_apps
from rayrlhf.runtime.run import INPUT_ERRORS, named_actor
from rayrlhf.untrusted_text import guard_terminal

LOOK_SECONDS = 2.0
OWN_MACHINE = ("127.0.0.1", "localhost", "::1")
EXAMPLE = {"query": ["Say hello. Hello!"], "prompts": ["Say hello. "], "labels": [None]}


@dataclass
class _Stop:
    """SIGTERM ends the server like Ctrl-C: by KeyboardInterrupt, which Ray's blocking calls propagate."""

    serving: bool = False

    def __call__(self, _signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt


def serve_reward(config: ServeRewardConfig) -> int:
    """Serve until Ctrl-C or SIGTERM. Exit codes: 0 ended by a signal, 2 bad input, 1 any other error, 130
    ended by a signal during startup.
    """
    guard_terminal()
    set_process_environment()
    console = Console("lines")
    previous = signal.getsignal(signal.SIGTERM)
    stop = _Stop()
    try:
        check_files(config)
        token = read_token(config.server)
        config = pin(config, console.say)
        sources = check_sources(config)
        fetch_here(config, console.say)
        if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
            check_own_port(config.server)
        with ray_session(NAMESPACE) as where, shared_access(config):
            signal.signal(signal.SIGTERM, stop)  # after ray.init, which installs its own
            console.say(where)
            _serve(config, sources, token, console, stop)
        raise AssertionError("a server ends by a signal or an error")
    except INPUT_ERRORS as error:
        console.error(str(error))
        return 2
    except DeploymentFailed as error:
        console.error(str(error))
        return 1
    except KeyboardInterrupt:
        console.say("stopped; nothing is left running" if stop.serving else "stopped during startup")
        return 0 if stop.serving else 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _serve(
    config: ServeRewardConfig, sources: list[Served], token: bytes | None, console: Console, stop: _Stop
) -> None:
    """Serve until an exception ends it; never returns."""
    url = url_of(config.server)
    start_serve(proxy_location="Disabled")  # the replicas listen by themselves
    with _placed(config, sources, console) as (run_id, slots):
        app = f"{run_id}-server"
        target = RunTarget(server_app(sources, config.server, slots, token), name=app, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        console.say(f"loading {', '.join(served.name for served in sources)}")
        wait_for_apps({app}, timeout_seconds=config.server.start_timeout_seconds, say=lambda _: None)
        if not answers(f"{url}/health"):
            raise DeploymentFailed(f"the application runs, but {url}/health does not respond")
        if token is None and config.server.host not in OWN_MACHINE:
            console.say(
                f"warning: unauthenticated, every client that can reach {config.server.host} is served: "
                "set server.token"
            )
        console.say(f"up: POST to {url}, health at {url}/health; stop with Ctrl-C or SIGTERM. Try:")
        headers = ["-H 'Content-Type: application/json'", *authorization(config.server)]
        print(f"curl -s {url} {' '.join(headers)} -d '{json.dumps(EXAMPLE)}'", flush=True)
        stop.serving = True
        _stay(app, console)


@contextmanager
def _placed(
    config: ServeRewardConfig, sources: list[Served], console: Console
) -> Iterator[tuple[str, Slots | None]]:
    """Yields the server's id and the slots of its models. Apps and placement group are removed in any case;
    after a kill -9 of the driver the reaper does it.
    """
    run_id = f"rayrlhf-serve_reward-{uuid.uuid4().hex[:6]}"
    units = {
        f"reward:{index}": Units(served.source.num_replicas)
        for index, served in enumerate(sources)
        if isinstance(served.source, ServedModel)
    }
    slots = _create_slots(place(units, config.placement), config, run_id) if units else None
    if slots is not None:
        console.placement(slots)
        try:
            fetch_on_nodes(config, slots, console.say)
        except BaseException:
            slots.remove()
            raise
    lease = named_actor(_Lease, f"{run_id}-lease")
    reaper = start_reaper(
        run_id, f"{run_id}-lease", slots.group if slots is not None else PlacementGroup.empty()
    )
    try:
        yield run_id, slots
    finally:
        delete_apps(run_id)
        if slots is not None:
            slots.remove()
        for actor in (reaper, lease):  # otherwise they would live as long as this process's Ray session
            ray.kill(actor)


def _create_slots(spec: PlacementSpec, config: ServeRewardConfig, run_id: str) -> Slots:
    """Raises `PlacementError` immediately if the cluster is too small."""
    gpus = resolve_gpus_per_slot(config.placement.gpus_per_slot)
    total = ray.cluster_resources()
    for resource, each in (("CPU", spec.cpus_per_slot), ("GPU", gpus)):
        if spec.num_slots * each > total.get(resource, 0.0) + 1e-6:
            raise PlacementError(
                f"placement: {slots_in_words(spec.num_slots)} x {each:g} {resource}, but the cluster has "
                f"{total.get(resource, 0.0):g}. Fix: fewer num_replicas, placement.preset=colocate_all, a "
                "smaller placement.cpus_per_slot, or a larger cluster"
            )
    return create_slots(
        spec, gpus_per_slot=gpus, run_id=run_id, timeout_seconds=config.placement.start_timeout_seconds
    )


class _Lease:
    """Actor that dies with the driver, which the reaper notices."""

    def ping(self) -> bool:
        return True


def _stay(app: str, console: Console) -> None:
    """Report changes of the application's status. Raises `DeploymentFailed` when it is gone."""
    known = "RUNNING"
    while True:
        time.sleep(LOOK_SECONDS)
        applications = app_statuses()
        if app not in applications:
            raise DeploymentFailed(f"the application {app} has been deleted from this cluster's Serve")
        status = applications[app].app_status.status.value
        if status != known:
            console.say(f"{'healthy again' if status == 'RUNNING' else status.lower()}")
            known = status
