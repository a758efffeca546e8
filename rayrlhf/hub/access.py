"""How a process reaches the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """How a process reaches the hub. It holds a secret: it travels as an argument of actors' calls, which
    Ray keeps in memory, and never through an environment, a command line, a file or a log.
    """

    token: str | None = field(default=None, repr=False)
    endpoint: str | None = field(default=None, repr=False)  # may carry a password
    offline: bool = False


def offline_variable() -> dict[str, str]:
    """For the environment of processes with one of their own: who forbids the hub forbids it everywhere."""
    return {"HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]} if "HF_HUB_OFFLINE" in os.environ else {}


def access_from_env() -> Access:
    """As this process's environment has it."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return Access(token, os.environ.get("HF_ENDPOINT"), constants.is_offline_mode())
