"""Address, token and reachability check of a reward server."""

from __future__ import annotations

import http.client
import os
import shlex
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

from rayrlhf.config.serve_reward import ServerConfig
from rayrlhf.reward_server.admission import token_digest
from rayrlhf.runtime.preflight import InputError

ANSWER_SECONDS = 20.0  # for running replicas to respond; immediate on an idle machine
POLL_SECONDS = 0.1
MIN_TOKEN_CHARACTERS = 16
ANY_ADDRESS = ("0.0.0.0", "::")


def check_own_port(server: ServerConfig) -> None:
    """If Ray will be started on this machine, the port must be free here. Raises `InputError`."""
    _check_port(server, "127.0.0.1" if server.host in ANY_ADDRESS else server.host)


def url_of(server: ServerConfig) -> str:
    """URL for requests; replicas are on the head node. Raises `InputError` if its port is in use."""
    host = _reachable(server.host)
    _check_port(server, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}{server.route}"


def read_token(server: ServerConfig) -> bytes | None:
    """Digest of the token named by `server.token`; the token itself stays here. Raises `InputError`."""
    if server.token is None:
        return None
    key = f"server.token={server.token}"
    kind, _, place = server.token.partition(":")
    try:
        token = os.environ[place] if kind == "env" else Path(place).read_text(encoding="utf-8")
    except KeyError as error:
        raise InputError(f"{key}: the environment has no variable {place}; set it to the token") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: cannot read the token ({error}); wanted a file with just it") from error
    token = token.strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"{key}: it holds {len(token)} characters; wanted a token of {MIN_TOKEN_CHARACTERS} or more "
            "printable ASCII characters without blanks, such as the output of `openssl rand -hex 32`"
        )
    return token_digest(token)


def authorization(server: ServerConfig) -> list[str]:
    """curl arguments for the token, by reference to its environment variable or file."""
    if server.token is None:
        return []
    kind, _, place = server.token.partition(":")
    return [f'-H "Authorization: Bearer {f"${place}" if kind == "env" else f"$(cat {shlex.quote(place)})"}"']


def answers(url: str) -> bool:
    """Whether a request is answered with status 200 in time."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while not _is_healthy(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _reachable(host: str) -> str:
    """Host at which to reach replicas of the head node that listen on `host`."""
    if host not in ANY_ADDRESS:
        return host
    heads = [node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    return heads[0]["NodeManagerAddress"] if heads else "127.0.0.1"


def _is_healthy(url: str) -> bool:
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with no_proxy.open(url, timeout=10) as response:
            return response.status == 200
    except (urllib.error.HTTPError, OSError, http.client.HTTPException):
        return False


def _check_port(server: ServerConfig, host: str) -> None:
    try:
        socket.create_connection((host, server.port), timeout=5).close()
    except OSError:  # the port is free
        return
    raise InputError(
        f"server.port={server.port}: another program listens at {host}:{server.port}; "
        "choose a free port, or stop that program"
    )
