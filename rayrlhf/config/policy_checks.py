"""Cross-section checks of a policy run: unfiltered sampling, dynamic sampling, warm-up, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayrlhf.config.base import Problem

if TYPE_CHECKING:
    from rayrlhf.config.policy import PolicyRunConfig

KEEPS_ALL_TOKENS = (-1, 0)  # of top_k


def nucleus_is_whole(config: PolicyRunConfig) -> Problem | None:
    top_p = config.rollout.sampling.top_p
    return _filtered("top_p", f"{top_p:g}", "1") if top_p < 1 else None


def no_token_is_cut(config: PolicyRunConfig) -> Problem | None:
    top_k = config.rollout.sampling.top_k
    return _filtered("top_k", str(top_k), "-1") if top_k not in KEEPS_ALL_TOKENS else None


def _filtered(key: str, got: str, whole: str) -> Problem:
    """The ratio of trainer to engine would mix two distributions: e^-20 over 400 tokens with top_p=0.95."""
    return Problem(
        f"rollout.sampling.{key}",
        got=got,
        wanted=f"{whole}: the trainer's log-probabilities are over all tokens, the engine's would be over "
        "those that the filter keeps",
        fix=f"remove rollout.sampling.{key}; eval.sampling.{key} may filter",
    )


def any_token_may_stop(config: PolicyRunConfig) -> Problem | None:
    """Before min_new_tokens the engine masks stop tokens and renormalises over the other tokens."""
    sampling = config.rollout.sampling
    if sampling.min_new_tokens == 0 or sampling.min_new_tokens > sampling.max_new_tokens:
        return None
    return Problem(
        "rollout.sampling.min_new_tokens",
        got=str(sampling.min_new_tokens),
        wanted="0: the trainer's log-probabilities are over all tokens, the engine's would be over those "
        "that do not stop",
        fix="remove rollout.sampling.min_new_tokens and score lengths by a reward; "
        "eval.sampling.min_new_tokens may be set",
    )


def dynamic_sampling_knows_its_source(config: PolicyRunConfig) -> Problem | None:
    dynamic, names = config.algorithm.dynamic_sampling, config.reward.source_names
    if dynamic is None or dynamic.source is None or dynamic.source in names:
        return None
    return Problem(
        "algorithm.dynamic_sampling.source",
        got=dynamic.source,
        wanted=f"the name of a reward source: {' or '.join(names)}",
        fix="correct it, or remove it to judge groups by the weighted sum of all sources",
    )


def actor_has_its_warmup(config: PolicyRunConfig) -> Problem | None:
    """The actor's learning-rate schedule starts after the critic's warm-up."""
    frozen, steps = config.algorithm.critic_warmup_steps, config.train.num_steps
    warmup = config.train.warmup_steps
    if frozen == 0 or frozen >= steps or warmup > steps or warmup <= steps - frozen:
        return None
    return Problem(
        "train.warmup_steps",
        got=f"{warmup} with algorithm.critic_warmup_steps={frozen} and train.num_steps={steps}",
        wanted=f"at most {steps - frozen}, the steps in which the actor is trained",
        fix="lower train.warmup_steps or algorithm.critic_warmup_steps, or raise train.num_steps",
    )


def shortest_evaluation_fits(config: PolicyRunConfig) -> Problem | None:
    """If eval.sampling takes its length limit from the rollout."""
    sampling, longest = config.eval.sampling, config.rollout.sampling.max_new_tokens
    if sampling.max_new_tokens is not None or sampling.min_new_tokens <= longest:
        return None
    return Problem(
        "eval.sampling.min_new_tokens",
        got=f"{sampling.min_new_tokens} with rollout.sampling.max_new_tokens={longest}",
        wanted=f"at most {longest}: eval.sampling.max_new_tokens is the rollout's where it is left out",
        fix="lower eval.sampling.min_new_tokens or set eval.sampling.max_new_tokens",
    )
