"""Registry of estimators and losses by config name: the function, its requirements, and its paper.

The config's choices, `--help`, the loop and the docs read these tables, so a new entry needs a function in
this package, a line here, and a test with an independent implementation (tests/algorithms/references.py).
torch is imported only when a function is first used, so that configs load fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    path: str  # "module:function" in rayrlhf.algorithms
    paper: str
    summary: str

    @property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.path.partition(":")
        return getattr(import_module(f"rayrlhf.algorithms.{module}"), name)


@dataclass(frozen=True)
class Estimator(Entry):
    """An advantage estimator (`algorithm.advantage`).

    With `needs_group`, `function(scores, group_mean, group_std, group_size)` gives one number per sample
    [N]; without, `function(rewards, values, loss_mask, cu_seqlens, gamma=, lam=)` gives advantages and
    returns per token.
    """

    needs_critic: bool = False
    needs_group: bool = False  # compares the samples of a prompt: rollout.group_size >= 2
    defined_for_one: bool = False  # a group with a single remaining sample still has an advantage
    whitened: bool = False  # over the global batch, with algorithm.whiten_advantages


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(
        "advantages:gae", "arXiv 1506.02438", "PPO with a critic", needs_critic=True, whitened=True
    ),
    "reinforce_pp": Estimator(
        "advantages:reinforce_pp", "arXiv 2501.03262", "return-to-go, no baseline", whitened=True
    ),
    "reinforce_pp_baseline": Estimator(
        "advantages:centred",
        "arXiv 2501.03262",
        "score minus the group's mean",
        needs_group=True,
        defined_for_one=True,
        whitened=True,
    ),
    "rloo": Estimator(
        "advantages:rloo", "arXiv 2402.14740", "score minus the mean of the others", needs_group=True
    ),
    "grpo": Estimator(
        "advantages:grpo", "arXiv 2402.03300", "score standardised in its group", needs_group=True
    ),
    "dr_grpo": Estimator(
        "advantages:centred",
        "arXiv 2503.20783",
        "score minus the group's mean, not whitened",
        needs_group=True,
        defined_for_one=True,
    ),
}


@dataclass(frozen=True)
class PolicyLoss(Entry):
    """A policy objective (`algorithm.policy_loss`): `function(logprobs, old_logprobs, advantages, loss_mask,
    cu_seqlens, **keywords)` gives the loss per token [T] and metrics.
    """

    reads: tuple[str, ...] = ()  # keys of `algorithm` passed as keyword arguments
    options: Mapping[str, float] = field(default_factory=dict)  # in loss_options
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of unset keys
    has_ratio: bool = True  # without a ratio, a batch allows only one optimizer step
    one_ratio_per_sequence: bool = False  # belongs to algorithm.aggregation=sequence_mean

    def keywords(self, algorithm: Any) -> dict[str, float]:
        """Keyword arguments for the function, from a valid `AlgorithmConfig`."""
        return {key: getattr(algorithm, key) for key in self.reads} | {
            **self.options,
            **algorithm.loss_options,
        }


CLIP = ("clip_low", "clip_high")

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(
        "policy_losses:ppo", "arXiv 1707.06347", "clipped ratio per token", reads=(*CLIP, "dual_clip")
    ),
    "gspo": PolicyLoss(
        "policy_losses:gspo",
        "arXiv 2507.18071",
        "clipped ratio per sequence",
        reads=(*CLIP, "dual_clip"),
        defaults={"aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},  # its section 5.1
        one_ratio_per_sequence=True,
    ),
    "cispo": PolicyLoss("policy_losses:cispo", "arXiv 2506.13585", "clipped ratio as a weight", reads=CLIP),
    "sapo": PolicyLoss(
        "policy_losses:sapo",
        "arXiv 2511.20347",
        "a soft gate on the ratio per token",
        options={"tau_pos": 1.0, "tau_neg": 1.05},  # as in the paper
        defaults={"aggregation": "sequence_mean"},
    ),
    "reinforce": PolicyLoss("policy_losses:reinforce", "Williams 1992", "no ratio", has_ratio=False),
}

AGGREGATIONS: dict[str, Entry] = {
    "token_mean": Entry("aggregate:token_mean", "arXiv 2503.14476", "every loss token weighs the same"),
    "sequence_mean": Entry("aggregate:sequence_mean", "arXiv 2402.03300", "every sequence weighs the same"),
    "sequence_sum_norm": Entry(
        "aggregate:sequence_sum_norm", "arXiv 2503.20783", "sums over the longest response's length"
    ),
}

KL_ESTIMATORS: dict[str, Entry] = {
    "k1": Entry("kl:k1", "joschu.net/blog/kl-approx", "Δ"),
    "k2": Entry("kl:k2", "joschu.net/blog/kl-approx", "Δ²/2"),
    "k3": Entry("kl:k3", "joschu.net/blog/kl-approx", "exp(−Δ) − 1 + Δ"),
}

# algorithm.rollout_correction: how a weight is bounded, and over what it is taken
ROLLOUT_CORRECTIONS: dict[str, Entry] = {
    "truncate": Entry("rollout_correction:truncate", "TIS, Yao et al. 2025", "cut to high"),
    "mask": Entry("rollout_correction:mask_outside", "IcePop, arXiv 2510.18855", "0 outside [low, high]"),
}
WEIGHT_LEVELS: dict[str, Entry] = {
    "token": Entry("rollout_correction:token_log_weights", "Yao et al. 2025", "the token's own"),
    "sequence": Entry(
        "rollout_correction:sequence_log_weights", "Yao et al. 2025", "the product over the sequence's tokens"
    ),
    "geometric": Entry(
        "rollout_correction:geometric_log_weights",
        "Liu, Li et al. 2025, When Speed Kills Stability",
        "the geometric mean over the sequence's tokens",
    ),
}
