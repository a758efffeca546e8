"""Credentials and endpoint with which a process reaches the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """Token, endpoint and offline flag. It holds a secret: it is passed as an argument of actor calls, which
    Ray keeps in memory, and never through an environment, a command line, a file or a log.
    """

    token: str | None = field(default=None, repr=False)
    endpoint: str | None = field(default=None, repr=False)  # may carry a password
    offline: bool = False


def offline_variable() -> dict[str, str]:
    """For the environment of child processes: offline mode of the driver applies everywhere."""
    return {"HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]} if "HF_HUB_OFFLINE" in os.environ else {}


def access_from_env() -> Access:
    """Token, endpoint and offline flag from this process's environment."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return Access(token, os.environ.get("HF_ENDPOINT"), constants.is_offline_mode())
