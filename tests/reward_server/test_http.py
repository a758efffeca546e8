"""Where a reward server listens, and what its token is."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.parse import load_config
from rayrlhf.config.serve_reward import ServerConfig, ServeRewardConfig
from rayrlhf.reward_server.http import authorization, check_own_port, read_token
from rayrlhf.runtime.preflight import InputError

TOKEN = "0123456789abcdef"
DIGEST = hashlib.sha256(TOKEN.encode()).digest()


def test_the_token_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_token(ServerConfig()) is None
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    assert read_token(ServerConfig(token="env:REWARD_TOKEN")) == DIGEST
    file = tmp_path / "a token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(ServerConfig(token=f"file:{file}")) == DIGEST
    assert authorization(ServerConfig(token="env:T")) == ['-H "Authorization: Bearer $T"']
    assert authorization(ServerConfig(token="file:/a b")) == ["""-H "Authorization: Bearer $(cat '/a b')\""""]
    assert authorization(ServerConfig()) == []


@pytest.mark.parametrize("held", ["", "short", "a b" * 10, "grün" * 10, "0123456789abcde\n0123456789"])
def test_a_token_that_cannot_be_one_is_refused_and_not_shown(
    held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", held)
    with pytest.raises(InputError, match=r"^server\.token=env:REWARD_TOKEN: it holds .*; wanted") as caught:
        read_token(ServerConfig(token="env:REWARD_TOKEN"))
    assert not held or held not in str(caught.value)


def test_a_token_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"server\.token=env:REWARD_TOKEN: the environment has no variable"):
        read_token(ServerConfig(token="env:REWARD_TOKEN"))
    with pytest.raises(InputError, match=r"server\.token=file:.*: cannot read the token"):
        read_token(ServerConfig(token=f"file:{tmp_path / 'none'}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.token=mysecret", "server.token"),
        ("server.token=env:", "server.token"),
        ("server.max_body_bytes=0", "server.max_body_bytes"),
        ("server.max_queries=0", "server.max_queries"),
        ("server.max_request_tokens=-1", "server.max_request_tokens"),
        ("server.read_timeout_seconds=0", "server.read_timeout_seconds"),
        ("server.max_connections=100", "server.max_connections"),
    ],
)
def test_limits_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(ServeRewardConfig, ["jobs/configs/serve_reward-cpu.yaml", override])
    assert len(caught.value.problems) == 1


def test_a_connection_is_wanted_for_each_request() -> None:
    with pytest.raises(ConfigError, match=r"100, with max_requests=256(.|\n)*raise max_connections"):
        load_config(ServeRewardConfig, ["jobs/configs/serve_reward-cpu.yaml", "server.max_connections=100"])


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(InputError, match=rf"server\.port={port}: another program listens"):
            check_own_port(ServerConfig(port=port))
