"""Warnings about valid but probably unintended settings of a policy run, printed once at its start.

Each names its keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.config.policy import PolicyRunConfig

WIDE_FOR_SEQUENCES = 0.05  # a hundred times GSPO's default range


def cautions(config: PolicyRunConfig) -> list[str]:
    return [*_stale_samples_are_corrected(config), *_sequences_are_clipped(config)]


def _stale_samples_are_corrected(config: PolicyRunConfig) -> Iterator[str]:
    staleness = config.rollout.max_staleness
    if not staleness or config.algorithm.rollout_correction is not None:
        return
    yield (
        f"rollout.max_staleness={staleness} without algorithm.rollout_correction: samples "
        f"up to {staleness} policy versions old are trained on as if they were the newest policy's own. Set "
        "algorithm.rollout_correction (for example {mode: truncate, high: 2.0}), or rollout.max_staleness=0"
    )


def _sequences_are_clipped(config: PolicyRunConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.policy_loss != "gspo" or max(algorithm.clip_low, algorithm.clip_high) < WIDE_FOR_SEQUENCES:
        return
    yield (
        f"algorithm.clip_low={algorithm.clip_low:g} and clip_high={algorithm.clip_high:g} with "
        "policy_loss=gspo: a sequence's mean ratio hardly ever leaves that range, so little is clipped. "
        "Remove both to get the paper's, 3e-4 and 4e-4"
    )
