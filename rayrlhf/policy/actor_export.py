"""Exports the actor, and the moving average of its weights, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.models.export import export_causal_lm
from rayrlhf.policy.actor_critic import Actor
from rayrlhf.train import collectives


def export_actor(actor: Actor, config: PolicyRunConfig, path: Path) -> None:
    """Write `path` and, with `algorithm.ema_beta`, `<path>-ema`. Collective."""
    _export(actor, config, path)
    if actor.average is not None:
        with actor.average.swapped():
            _export(actor, config, path.with_name(f"{path.name}-ema"))


def _export(actor: Actor, config: PolicyRunConfig, path: Path) -> None:
    causal_lm = actor.learner.module.causal_lm
    first = collectives.rank() == 0
    state = actor.learner.state_dict(causal_lm, on_this_rank=first)
    adapter = actor.learner.trained_adapter(causal_lm, config.model, on_this_rank=first)
    if first:
        tokenizer = prompt_tokenizer(
            config.model.path, config.model.trust_remote_code, read_chat_template(config.data)
        )
        export_causal_lm(causal_lm, state, tokenizer, path, adapter=adapter)
