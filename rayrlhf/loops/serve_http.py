"""Ray Serve with its HTTP proxy on: started, or found to be what the config wants."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request

import ray

from rayrlhf.config.serve_reward import ServerConfig
from rayrlhf.loops.checks import InputError
from rayrlhf.loops.session import start_serve

PROXY_SECONDS = 20.0  # for Serve's HTTP proxy to do what Serve was told; 3 s on an idle machine
POLL_SECONDS = 0.1
ANY_ADDRESS = ("0.0.0.0", "::")
# What the proxy says of itself: that it is well, or that it knows no application yet.
PROXY_WORDS = ("success", "Route table is not populated yet.")


def check_own_port(server: ServerConfig) -> None:
    """For a Ray that is yet to be started on this machine: nobody may have the port. Raises `InputError`."""
    _check_port(server, "127.0.0.1" if server.host in ANY_ADDRESS else server.host)


def start_http(server: ServerConfig) -> str:
    """Serve with its HTTP proxy where the config wants it; the URL of the requests. Raises `InputError`.

    A cluster has one Serve, whose proxy stands where the first to start Serve wanted it: what others chose
    cannot be changed while it runs.
    """
    host = _reachable(server.host)
    root = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
    if not _proxy_answers(root):
        _check_port(server, host)
        start_serve(proxy_location="HeadOnly", http_options={"host": server.host, "port": server.port})
        _wait_for_proxy(root, server)
    status, routes = _get(f"{root}/-/routes")
    taken = json.loads(routes) if status == 200 else {}
    if server.route in taken:
        raise InputError(
            f"server.route={server.route}: the application {taken[server.route]} has it on this cluster; "
            "choose another route"
        )
    return root + server.route


def answers(url: str) -> bool:
    """Whether a request gets an answer of status 200 soon; the proxy learns of an application last of all."""
    deadline = time.monotonic() + PROXY_SECONDS
    while _get(url)[0] != 200:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _wait_for_proxy(root: str, server: ServerConfig) -> None:
    deadline = time.monotonic() + PROXY_SECONDS
    while not _proxy_answers(root):
        if time.monotonic() > deadline:
            raise InputError(
                f"server.host={server.host}, server.port={server.port}: no proxy of Ray Serve at {root}. "
                "A cluster has one Serve, and this one's has other HTTP settings or no proxy (training runs "
                "need none): start the reward server before them, or end their runs and `serve shutdown`, or "
                "unset RAY_ADDRESS to use a Ray of its own"
            )
        time.sleep(POLL_SECONDS)


def _reachable(host: str) -> str:
    """Where to reach a proxy of the head node that listens on `host`."""
    if host not in ANY_ADDRESS:
        return host
    heads = [node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    return heads[0]["NodeManagerAddress"] if heads else "127.0.0.1"


def _proxy_answers(root: str) -> bool:
    return _get(f"{root}/-/healthz")[1] in PROXY_WORDS


def _get(url: str) -> tuple[int | None, str]:
    """Status and text; None where nobody answers in HTTP."""
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with no_proxy.open(url, timeout=10) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None, ""


def _check_port(server: ServerConfig, host: str) -> None:
    try:
        socket.create_connection((host, server.port), timeout=5).close()
    except OSError:  # nobody listens
        return
    raise InputError(
        f"server.port={server.port}: another program listens at {host}:{server.port}; "
        "choose a free port, or end that program"
    )
