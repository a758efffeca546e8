"""Losses of reward models: of pairs of scores (outcome), and of step labels (process).

Shapes: [P] pairs, N labelled steps. Losses are per pair or per step and not averaged.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

from rayrlhf.algorithms.preference_losses import pair_metrics

BAD, GOOD = 0, 1  # the columns of a process reward model's logits

RewardLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-log σ(r_w - r_l - margin), [P] in fp32, with metrics [P] (Bradley & Terry 1952).

    The scores and margins are [P]; a margin (arXiv 2307.09288) says by how much the chosen one is better.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return -logsigmoid(chosen - rejected - margin.float()), pair_metrics(chosen, rejected)


def log_exp(chosen: Tensor, rejected: Tensor, margin: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """log(1 + exp(r_l - r_w + margin)), [P] in fp32, with metrics [P] (arXiv 2204.05862).

    The same function as `bradley_terry`, since -log σ(x) = log(1 + exp(-x)); here under the name
    that configs of other code bases use. As a softplus it does not overflow where exp would.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return softplus(rejected - chosen + margin.float()), pair_metrics(chosen, rejected)


REWARD_LOSSES: dict[str, RewardLoss] = {"bradley_terry": bradley_terry, "log_exp": log_exp}


def prm(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-t·log p(good) - (1-t)·log p(bad), [N] in fp32 (arXiv 2305.20050; soft labels: 2312.08935).

    `logits` [N, 2] are those of (bad, good) at the steps' last tokens, `targets` [N] in [0, 1] the
    probability that a step is good. The metrics are [N] too, without gradient: which steps have a hard label,
    0 or 1, and which of those are judged right; a tie counts as wrong for a good step.
    """
    logprobs = log_softmax(logits.float(), -1)
    targets = targets.float()
    loss = -targets * logprobs[:, GOOD] - (1.0 - targets) * logprobs[:, BAD]
    says_good = logits.detach()[:, GOOD] > logits.detach()[:, BAD]
    good, bad = targets == 1.0, targets == 0.0
    steps = {
        "good": good,
        "bad": bad,
        "good_right": good & says_good,
        "bad_right": bad & ~says_good,
    }
    return loss, {key: which.float() for key, which in steps.items()}
