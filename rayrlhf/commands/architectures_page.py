"""Writes docs/architectures.md with the verdicts of `rayrlhf.models.probe` on all families.

Usage: `python -m rayrlhf.commands.architectures_page [FILE]`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rayrlhf.models.probe import Verdict, verdict_of

HEAD = """\
# Architectures

Which model architectures are supported. A small copy of each, with random weights in fp32, is run on three
sequences: its log-probabilities by the functions that training uses are compared with those of transformers'
own forward pass on each sequence alone. Every job does the same with its own models' configs before anything
is placed, and `rayrlhf plan` shows the result.

- **supported packed**: sequences share a stream.
- **supported one sequence per stream**: right, but slower. Layers carry state from one sequence into the next
  (state space, linear attention, short convolutions), rotary frequencies depend on the longest sequence of a
  stream, or attention has no kernel for packed streams. Nothing has to be set.
- **refused**: the job ends with the reason before anything is started.

An engine chooses rotary frequencies once for all of its sequences. A run with engines is therefore refused
where `longrope` would have transformers choose others for some of them: where prompts and responses together
may be longer than `original_max_position_embeddings`.

The configs are those that transformers' classes have without arguments, at a length beyond all of their
windows, with these changes: multipliers that would be 1 are others, and the settings under "with" apply.
*Packed* is the largest difference of a log-probability (or entropy) had all sequences shared a stream,
*measured* that of the way that is taken. The latter is never above 1e-4.

"""
COLUMNS = "| model_type | with | verdict | measured | packed | why |\n|---|---|---|---|---|---|"
NOT_ONE = {
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.4,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "key_multiplier": 0.7,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
LONGROPE |= {"original_max_position_embeddings": 4096}
LONGROPE |= {"short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [2.0 + i for i in range(48)]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LFM2 = ["conv", "conv", "full_attention", "conv"] * 4
GRANITE4 = ["mamba"] * 5 + ["attention"] + ["mamba"] * 4


class Entry(NamedTuple):
    """A family, or one of its variants: what is set in the config, and how that is called."""

    model_type: str
    settings: dict[str, Any]
    variant: str = ""


# In addition to every family as it is: what its defaults do not show, or what they leave out.
VARIANTS = (
    Entry("llama", {"rope_parameters": DYNAMIC}, "dynamic rope, within its positions"),
    Entry("llama", {"rope_parameters": DYNAMIC}, "dynamic rope, beyond its positions"),
    Entry("phi3", {"rope_parameters": LONGROPE}, "longrope, within 4096 tokens"),
    Entry("phi3", {"rope_parameters": LONGROPE}, "longrope, beyond 4096 tokens"),
    Entry("lfm2", {"layer_types": LFM2, "num_hidden_layers": 16}, "convolutions"),
    Entry("lfm2_moe", {"layer_types": LFM2, "num_hidden_layers": 16}, "convolutions"),
    Entry("granitemoehybrid", {"layer_types": GRANITE4, "num_hidden_layers": 10}, "attention in layer 6"),
    Entry("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    Entry("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"),
    Entry("mistral", {"sliding_window": None}, "no window"),
    Entry("ministral", {"head_dim": 128}, "head_dim"),
    Entry("nemotron", {"head_dim": 128, "num_key_value_heads": 8}, "head_dim, key-value heads"),
    Entry("hunyuan_v1_dense", {"head_dim": 128}, "head_dim"),
    Entry("hunyuan_v1_moe", {"head_dim": 128, "num_experts": 8, "moe_topk": 2}, "head_dim, experts"),
    Entry("dots1", {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2}, "experts"),
    Entry("deepseek_v2", {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1}, "two experts per token"),
)
WITHIN = 64  # tokens, for variants within their limits


def entries() -> Iterator[Entry]:
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield Entry(model_type, {})
        yield from (variant for variant in VARIANTS if variant.model_type == model_type)


def config_of(entry: Entry) -> PreTrainedConfig:
    config = CONFIG_MAPPING[entry.model_type](**entry.settings)
    text = config.get_text_config()
    for name, value in NOT_ONE.items():
        if getattr(text, name, None) == 1.0:
            setattr(text, name, value)
    return config


def row(entry: Entry) -> str:
    try:
        config = config_of(entry)
    except Exception as error:  # a class that cannot be made without arguments; a row, not a gap
        reason = f"its config cannot be made without arguments: {type(error).__name__}"
        return _row(entry, Verdict(None, float("nan"), reason=reason))
    return _row(entry, verdict_of(config, longest=WITHIN if "within" in entry.variant else None))


def _row(entry: Entry, verdict: Verdict) -> str:
    cells = [f"`{entry.model_type}`", entry.variant, verdict.name, _number(verdict.deviation)]
    cells += [_number(verdict.packed_deviation), verdict.reason.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    return "" if value != value else f"{value:.0e}"


def page(rows: Sequence[str]) -> str:
    count = len({line.split("|")[1] for line in rows})
    tried = f"{count} families of transformers {transformers.__version__}, and variants of some.\n\n"
    made = "\nThis page is made by `python -m rayrlhf.commands.architectures_page docs/architectures.md`.\n"
    return HEAD + tried + "\n".join([COLUMNS, *rows]) + "\n" + made


def main() -> None:
    torch.set_num_threads(1)
    text = page([row(entry) for entry in entries()])
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
