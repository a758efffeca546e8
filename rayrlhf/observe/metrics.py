"""What is measured: the phase timer and the list of every metric key, from which the docs are made."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

METRICS: dict[str, str] = {
    "reward/mean": "mean score of the step's samples, after weights and clip",
    "reward/std": "standard deviation of the scores",
    "reward/failed": "samples dropped because a reward source failed for good",
    "rollout/response_tokens_mean": "mean response length, tokens",
    "rollout/truncated_fraction": "share of responses stopped by rollout.sampling.max_new_tokens",
    "rollout/tokens_per_second": "response tokens per second of the rollout phase, all engines",
    "rollout/retries": "requests sent again because their engine died",
    "rollout/logprob_diff_mean": "mean |log-probability of the trainer - of the engine| per response token",
    "rollout/logprob_diff_max": "largest such difference of the step",
    "kl/mean": "mean KL estimate to the reference per response token",
    "kl/coef": "the KL coefficient in force",
    "loss/actor": "policy objective of the last update",
    "loss/critic": "value objective of the last update",
    "loss/entropy": "mean entropy of the policy per response token, nats",
    "loss/approx_kl": "mean k3 estimate of KL(old policy || new policy) per response token",
    "loss/clip_fraction": "share of response tokens at which the ratio was clipped",
    "loss/value_clip_fraction": "share of response tokens at which the value was clipped",
    "loss/dual_clip_fraction": "share of response tokens at which the dual clip bounds the loss",
    "loss/ratio": "mean ratio of new to old probability per response token",
    "loss/value": "mean value the critic predicts per response token",
    "loss/return": "mean return per response token",
    "loss/explained_variance": "1 - var(returns - values) / var(returns)",
    "loss/actor_grad_norm": "gradient norm before clipping",
    "loss/critic_grad_norm": "gradient norm before clipping",
    "loss/actor_lr": "learning rate",
    "loss/critic_lr": "learning rate",
    "loss/actor_bad_steps": "updates skipped because the gradient was not finite",
    "loss/critic_bad_steps": "updates skipped because the gradient was not finite",
    "data/samples": "samples trained on this step",
    "data/tokens": "tokens, prompts included, trained on this step",
    "data/micro_batches": "micro-batches per rank and update",
    "train/tokens_per_second": "tokens per second of the update phase, all ranks",
    "eval/reward_mean": "mean score of the held-out prompts",
    "eval/reward_ci_low": "lower end of the bootstrap 95 % interval of eval/reward_mean",
    "eval/reward_ci_high": "upper end of the bootstrap 95 % interval of eval/reward_mean",
    "eval/response_tokens_mean": "mean response length on the held-out prompts, tokens",
    "time/rollout": "seconds generating and scoring",
    "time/logprobs": "seconds computing old and reference log-probabilities and values",
    "time/update_actor": "seconds updating the actor",
    "time/update_critic": "seconds updating the critic",
    "time/weight_sync": "seconds until every engine held the new weights",
    "time/checkpoint": "seconds saving",
    "time/eval": "seconds evaluating",
    "time/step": "seconds of the whole step",
}


class Timer:
    """Seconds per named phase since the last `drain`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        drained = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds.clear()
        return drained


def check_keys(metrics: dict[str, float]) -> None:
    """A key that is not in the list would be missing from the docs: an error of ours, found by any run."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise KeyError(f"metrics not listed in rayrlhf.observe.metrics.METRICS: {unknown}")
