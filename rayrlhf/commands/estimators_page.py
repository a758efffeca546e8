"""Writes docs/estimators.md from the registry: `python -m rayrlhf.commands.estimators_page FILE`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rayrlhf.algorithms import registry
from rayrlhf.algorithms.registry import Entry, Estimator, PolicyLoss

HEAD = """\
# Estimators and losses
Written by `make rendered` from `rayrlhf/algorithms/registry.py`, which the config's choices and `--help` read
too. Formulas are in the functions' docstrings; [numerics.md](numerics.md) says what is done where a
paper leaves it open.
"""


def page() -> str:
    sections = [
        ("algorithm.advantage", registry.ESTIMATORS),
        ("algorithm.policy_loss", registry.POLICY_LOSSES),
        ("algorithm.aggregation", registry.AGGREGATIONS),
        ("algorithm.kl_estimator", registry.KL_ESTIMATORS),
        ("algorithm.rollout_correction.mode", registry.ROLLOUT_CORRECTIONS),
        ("algorithm.rollout_correction.level", registry.WEIGHT_LEVELS),
    ]
    return HEAD + "".join(f"\n## `{key}`\n" + "\n".join(_table(table)) + "\n" for key, table in sections)


def _table(table: Mapping[str, Entry]) -> Iterator[str]:
    yield "| name | what it is | function | source | |"
    yield "|---|---|---|---|---|"
    for name, entry in table.items():
        module, _, function = entry.path.partition(":")
        where = f"[`{function}`](../rayrlhf/algorithms/{module}.py)"
        yield f"| `{name}` | {entry.summary} | {where} | {entry.paper} | {', '.join(_traits(entry))} |"


def _traits(entry: Entry) -> Iterator[str]:
    if isinstance(entry, Estimator):
        if entry.needs_critic:
            yield "needs a critic"
        if entry.needs_group:
            yield "compares the samples of a prompt"
        if entry.whitened:
            yield "whitened over the batch"
    if isinstance(entry, PolicyLoss):
        if entry.reads:
            yield "reads " + ", ".join(f"`{key}`" for key in entry.reads)
        for key, value in entry.options.items():
            yield f"`loss_options.{key}`: {value:g}"
        for key, value in entry.defaults.items():
            yield f"`{key}`: {value} where left out"
        if not entry.has_ratio:
            yield "one optimizer step per batch"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
