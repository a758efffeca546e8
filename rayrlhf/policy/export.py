"""The actor as users load it: a Hugging Face folder, and beside it the moving average of its weights."""

from __future__ import annotations

from pathlib import Path

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.models.export import export_causal_lm
from rayrlhf.policy.actor_critic import Learners
from rayrlhf.train import collectives


def export_actor(learners: Learners, config: PolicyRunConfig, path: Path) -> None:
    """Write `path` and, where an average is kept, `<path>-ema`. Collective."""
    _export(learners, config, path)
    if learners.average is not None:
        with learners.average.swapped():
            _export(learners, config, path.with_name(f"{path.name}-ema"))


def _export(learners: Learners, config: PolicyRunConfig, path: Path) -> None:
    causal_lm = learners.actor.module.causal_lm
    first = collectives.rank() == 0
    state = learners.actor.state_dict(causal_lm, on_this_rank=first)
    adapter = learners.actor.trained_adapter(causal_lm, config.model, on_this_rank=first)
    if first:
        tokenizer = prompt_tokenizer(
            config.model.path, config.model.trust_remote_code, read_chat_template(config.data)
        )
        export_causal_lm(causal_lm, state, tokenizer, path, adapter=adapter)
