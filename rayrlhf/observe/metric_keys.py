"""Phase timer, and the list of all metric keys, from which the docs are generated."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

METRICS: dict[str, str] = {
    "reward/mean": "mean score of the step's samples, after weights and clip",
    "reward/std": "standard deviation of the scores",
    "reward/unverified": "answers since the last step, held-out too, whose grading timed out; counted wrong",
    "reward/failed": "samples dropped because a reward source failed permanently",
    "reward/accuracy": "share of pairs whose chosen response has the higher reward, or of steps judged right",
    "reward/accuracy_good": "share of good steps judged good",
    "reward/accuracy_bad": "share of bad steps judged bad",
    "reward/margin": "mean difference of the rewards of chosen and rejected responses",
    "reward/chosen": "mean reward of chosen responses (of preference losses: the implicit one)",
    "reward/rejected": "mean reward of rejected responses",
    "reward/desirable": "mean implicit reward of desirable responses",
    "reward/undesirable": "mean implicit reward of undesirable responses",
    "rollout/samples": "responses of the step, dropped ones included",
    "rollout/response_tokens_mean": "mean response length, tokens",
    "rollout/truncated_fraction": "share of responses stopped by rollout.sampling.max_new_tokens",
    "rollout/tokens_per_second": "response tokens per second of the rollout phase, all engines",
    "rollout/retries": "requests sent again because their engine died",
    "rollout/turns_mean": "mean responses of the policy per sample (above 1 with an environment)",
    "rollout/failed_episodes": "episodes whose environment failed or ran out of time",
    "rollout/staleness_mean": "mean age of the trained tokens, in policy versions",
    "rollout/staleness_max": "age of the oldest trained token, in policy versions",
    "rollout/prompt_batches": "prompt batches of rollout.prompts_per_step per step (dynamic sampling)",
    "rollout/groups_in_range": "groups that algorithm.dynamic_sampling keeps, surplus ones included",
    "rollout/empty_steps": "1 for a step without any group to train on",
    "rollout/restarted_groups": "groups started again because they had become too old (oversampling)",
    "rollout/logprob_diff_mean": "mean |log-probability of the trainer - of the engine| per response token",
    "rollout/logprob_diff_max": "largest such difference of the step",
    "kl/mean": "mean KL estimate to the reference per response token",
    "kl/coef": "the KL coefficient in force",
    "kl/mismatched": "KTO's reference point: mean log-ratio of responses to other prompts, at least 0",
    "loss/actor": "policy objective, with loss/ptx where there is data.ptx",
    "loss/critic": "value objective",
    "loss/model": "objective of a supervised job",
    "loss/actor_balance": "load-balancing loss of the actor's experts; experts per token if balanced",
    "loss/critic_balance": "the same of the critic's",
    "loss/model_balance": "the same of a supervised job's model",
    "experts/actor_load_max": "tokens of the actor's busiest expert over the mean, averaged over layers",
    "experts/critic_load_max": "the same of the critic's",
    "experts/model_load_max": "the same of a supervised job's model",
    "experts/actor_unused_fraction": "share of the actor's experts that no token of the step was sent to",
    "experts/critic_unused_fraction": "the same of the critic's",
    "experts/model_unused_fraction": "the same of a supervised job's model",
    "loss/model_grad_norm": "gradient norm before clipping",
    "loss/model_lr": "learning rate",
    "loss/model_bad_steps": "updates skipped because the gradient was not finite",
    "loss/nll": "mean negative log-probability of the trained responses, nats per token",
    "loss/divergence": "mean divergence from the teacher per loss token, nats",
    "loss/ptx": "mean negative log-probability per token of data.ptx, nats",
    "loss/is_weight_mean": "mean importance weight of trainer over engine per response token, before bounds",
    "loss/is_weight_max": "largest such weight of the step",
    "loss/is_masked_fraction": "share of response tokens whose weight algorithm.rollout_correction bounds",
    "loss/entropy": "mean entropy of the policy per response token, nats",
    "loss/approx_kl": "mean k3 estimate of KL(old policy || new policy) per response token",
    "loss/clip_fraction": "share of response tokens at which the ratio was clipped",
    "loss/value_clip_fraction": "share of response tokens at which the value was clipped",
    "loss/dual_clip_fraction": "share of response tokens at which the dual clip bounds the loss",
    "loss/ratio": "mean ratio of new to old probability per response token",
    "loss/value": "mean value the critic predicts per response token",
    "loss/return": "mean return per response token",
    "loss/explained_variance": "1 - var(returns - values) / var(returns)",
    "loss/actor_grad_norm": "mean gradient norm before clipping, of the updates with a finite one",
    "loss/critic_grad_norm": "mean gradient norm before clipping, of the updates with a finite one",
    "loss/actor_lr": "learning rate",
    "loss/critic_lr": "learning rate",
    "loss/actor_bad_steps": "updates skipped because the gradient was not finite",
    "loss/critic_bad_steps": "updates skipped because the gradient was not finite",
    "data/samples": "samples trained on this step",
    "data/tokens": "tokens, prompts included, trained on this step",
    "data/mini_batches": "mini-batches per pass: algorithm.mini_batches, fewer where samples were dropped",
    "data/empty_mini_batches": "mini-batches without a loss token, of all passes: no update was made",
    "data/micro_batches": "micro-batches per rank and pass over the step's samples",
    "data/fill": "tokens in the micro-batches as a share of their budget, padding batches left out; in a "
    "policy run, those of shared prefixes count once",
    "data/prefix_share": "share of the tokens that is not computed: those of prefixes that sequences share",
    "data/padding_fraction": "share of micro-batches that are padding (weight 0), which keep ranks in step",
    "data/imbalance": "how many more tokens than the mean the busiest rank trains on, as a share",
    "data/imbalance_before": "the same if every rank trained on the samples that it collected",
    "rollout/weight_sync_fallbacks": "1 when the direct transfer failed and the object store was used",
    "rollout/refused_connections": "unauthorised connections to the weight transfer's store, in the attempt",
    "rollout/freed_bytes": "bytes that all engines released while the trainers worked",
    "train/epoch": "passes over the training data so far",
    "train/tokens_per_second": "tokens per second of the update phase, all ranks",
    "eval/reward_mean": "mean score of the held-out prompts",
    "eval/reward_ci_low": "lower end of the bootstrap 95 % interval of eval/reward_mean",
    "eval/reward_ci_high": "upper end of the bootstrap 95 % interval of eval/reward_mean",
    "eval/response_tokens_mean": "mean response length on the held-out prompts, tokens",
    "eval/samples": "held-out samples of a supervised job",
    "eval/loss": "objective of a supervised job on the held-out samples",
    "eval/loss_ci_low": "lower end of the bootstrap 95 % interval of eval/loss",
    "eval/loss_ci_high": "upper end of the bootstrap 95 % interval of eval/loss",
    "eval/calibration_error": "expected calibration error of σ(margin) as the probability of being preferred",
    "time/rollout": "seconds generating and scoring",
    "time/logprobs": "seconds computing old and reference log-probabilities and values",
    "time/update_actor": "seconds updating the actor",
    "time/update_critic": "seconds updating the critic",
    "time/update": "seconds updating a supervised job's model",
    "time/data": "seconds waiting for the next step's samples",
    "time/reference": "seconds computing reference log-probabilities of all samples before training",
    "time/engines_sleep": "seconds until the engines slept and the optimizer was loaded again",
    "time/weight_sync": "seconds until every engine held the new weights",
    "time/checkpoint": "seconds saving",
    "time/eval": "seconds evaluating",
    "time/export": "seconds writing the actor as a Hugging Face folder",
    "time/step": "seconds of the whole step",
}


# Prefixes of keys that end in a user-defined name or in a number.
METRIC_FAMILIES: dict[str, str] = {
    "reward/source/": "mean raw reward of the source of that name, before weight and normalisation",
    "eval/": "the metric of the same name with loss/, reward/ or kl/, on held-out samples",
    "eval/pass_at_": "probability that one of k responses to a prompt has a raw reward of eval.pass_score",
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
    """Raises `KeyError` for keys that are not listed, which would be missing from the docs."""
    families = tuple(METRIC_FAMILIES)
    unknown = sorted(key for key in metrics if key not in METRICS and not key.startswith(families))
    if unknown:
        raise KeyError(f"metrics not listed in rayrlhf.observe.metric_keys.METRICS: {unknown}")
