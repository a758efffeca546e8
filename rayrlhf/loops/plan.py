"""`rayrlhf plan`: what the placement says of a job, with the verdicts on its models' architectures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rayrlhf.placement import plan_command


def main(words: Sequence[str]) -> int:
    """The exit code of `plan_command.main`."""
    return plan_command.main(words, _architectures)


def _architectures(config: Any) -> Iterator[str]:
    from rayrlhf.loops.architectures import told_architectures  # and with it torch: help answers at once

    return told_architectures(config)
