"""Checks package and key of Weights & Biases, without contacting the server."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from rayrlhf.config.base import ConfigError, Problem

OFFLINE_MODES = ("offline", "disabled", "dryrun")


def check_wandb(config: Any) -> None:
    """Raises `ConfigError` if the package or the key is missing, which would otherwise fail at the first
    report. An unreachable server is not an error: the run trains anyway.
    """
    settings = getattr(getattr(config, "observe", None), "wandb", None)
    if settings is None:
        return
    if importlib.util.find_spec("wandb") is None:
        fix = "pip install 'rayrlhf[wandb]', or remove observe.wandb"
        raise ConfigError([Problem("observe.wandb", "set", "the package wandb, which is not installed", fix)])
    if settings.mode != "online" or os.environ.get("WANDB_MODE") in OFFLINE_MODES or _has_key():
        return
    raise ConfigError(
        [
            Problem(
                "observe.wandb.mode",
                got="online, without a key on this machine",
                wanted="WANDB_API_KEY, or what `wandb login` leaves",
                fix="set WANDB_API_KEY or run `wandb login`; or set observe.wandb.mode to offline",
            )
        ]
    )


def _has_key() -> bool:
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    try:  # no public call looks up a key without prompting for it at the terminal
        found = wbauth.authenticate_session(
            host=wandb.Settings().base_url, source="rayrlhf", prompt=False, update_session=False
        )
    except AuthenticationError as error:
        problem = Problem("WANDB_API_KEY", "a key that is malformed", "a key of W&B", str(error))
        raise ConfigError([problem]) from error
    return found is not None
