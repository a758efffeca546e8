"""A W&B key that is missing is found before anything starts, not at the first report."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.observe.wandb_access import check_wandb
from tests.samples import make_config


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without keys, files or settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_config(mode: str = "online") -> object:
    return make_config(observe={"wandb": {"project": "tests", "mode": mode}})


def test_online_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"observe\.wandb\.mode[\s\S]*WANDB_API_KEY[\s\S]*offline"):
        check_wandb(wandb_config())


def test_a_key_in_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    check_wandb(wandb_config())


def test_offline_and_none_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    check_wandb(wandb_config("offline"))
    check_wandb(make_config())
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(wandb_config())
