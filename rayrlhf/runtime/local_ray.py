"""Starts a local Ray that is not reachable from other machines or by other users of this machine, with the
services that a single job needs.

By default Ray's services listen on every interface, and Ray makes its token file readable by all users of the
machine. Any process that reaches those ports with the token can run code with the rights of this process.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray._private.parameter as ray_parameter
import ray._private.services as ray_services
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR, _enable_token_auth
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]

from rayrlhf.runtime.cleanup import name_session, start_watchdog

# With 0 the node's address is 127.0.0.1, and then every service of Ray 2.60 listens only there; an argument
# of `ray.init` is replaced by the address of an interface (services.resolve_ip_for_localhost).
LOOPBACK_SETTING = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

SYSTEM_CONFIG = {
    # Nobody reads a local Ray's metrics, which its agent would collect from every process.
    "enable_metrics_collection": False,
    # Ray ends idle workers after a second; the next task would import its modules again.
    "idle_worker_killing_time_threshold_ms": 30_000,
}


class LocalRay(NamedTuple):
    """A Ray that this process has started for its job."""

    warnings: list[str]


def is_local(address: str | None) -> bool:
    """Whether `ray.init` starts a Ray for this value of RAY_ADDRESS."""
    return address in (None, "", "local")


@contextmanager
def local_ray(namespace: str) -> Iterator[LocalRay]:
    """While the body runs, a Ray with all cores of this machine; nothing of it outlives a kill -9."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no cloud takes this node away
    os.environ.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, "0")  # as Ray Train sets it
    watchdog = start_watchdog()
    try:
        with private_ray() as warnings:
            ray.init(
                num_cpus=os.cpu_count(),
                include_dashboard=False,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _system_config=SYSTEM_CONFIG,
            )
        name_session(watchdog, ray.get_runtime_context().get_session_name())
        yield LocalRay(warnings)
    finally:
        ray.shutdown()
        watchdog.terminate()
        watchdog.wait()


@contextmanager
def private_ray() -> Iterator[list[str]]:
    """In this context `ray.init` starts a Ray on loopback, with a token. Yields warnings for the user."""
    constants: Any = ray_constants
    setting, allowed = os.environ.get(LOOPBACK_SETTING), constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK_SETTING], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        with _few_services():
            yield _authenticate()
    finally:
        constants.ENABLE_RAY_CLUSTER = allowed
        if setting is None:
            os.environ.pop(LOOPBACK_SETTING, None)
        else:
            os.environ[LOOPBACK_SETTING] = setting


@contextmanager
def _few_services() -> Iterator[None]:
    """In this context `ray.init` starts neither an autoscaler, which has no nodes to add, nor a log monitor,
    as the driver does not print its workers' output, nor the dashboard's process, which Ray 2.60 starts with
    `include_dashboard=False`, too. Each takes a second of CPU to start, and then some of every second.
    """
    options: Any = {"no_monitor": True, "include_log_monitor": False}
    parameter, services = ray_parameter.RayParams, ray_services.start_api_server
    changed: Any = (ray_parameter, ray_services)
    changed[0].RayParams = partial(parameter, **options)
    changed[1].start_api_server = lambda *_, **__: (None, None)  # no URL and no process
    try:
        yield
    finally:
        changed[0].RayParams, changed[1].start_api_server = parameter, services


def _authenticate() -> list[str]:
    mode = os.environ.get(AUTH_MODE_ENV_VAR)
    if mode is not None and mode.lower() != "token":
        return [f"{AUTH_MODE_ENV_VAR}={mode}: every user of this machine can run code in this Ray as you"]
    _enable_token_auth()
    if os.environ.get(TOKEN):
        return []
    given = os.environ.get(TOKEN_PATH)
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if not given and not path.exists():
        try:
            make_token_file(path)
        except OSError:  # the home is not writable: the token exists only in this process
            os.environ[TOKEN] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()
    return token_file_warnings(path) if path.exists() else []


def make_token_file(path: Path) -> None:
    """Write a new token that only its owner can read. If two processes do so at once, the first token is
    kept.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))  # 256 bits, as Ray makes its own
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def token_file_warnings(path: Path) -> list[str]:
    """A warning for a token file that others can read or replace."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return [f"Ray's token file {path} belongs to another user, who can run code in this Ray as you"]
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(found.st_mode)
        return [f"other users can read Ray's token file (mode {mode:o}): chmod 600 {path}"]
    return []
