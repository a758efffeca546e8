"""Maximum sequence length of a model, from its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Models with a table of positions: a position beyond it fails with "index out of range in self".
TABLES = ("gpt2", "gpt_neo", "gptj", "codegen", "gpt_bigcode", "openai-gpt", "imagegpt", "opt", "biogpt")
TABLES += ("bert", "distilbert", "albert", "electra", "ernie", "nezha", "deberta", "deberta-v2", "mpnet")
OFFSET_TABLES = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "longformer",
    "data2vec-text",
)  # the first two are unused
TABLES += OFFSET_TABLES
RELATIVE = ("deberta", "deberta-v2")  # unless position_biased_input
KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
# Rope types whose config.json has the number of positions after scaling, as vLLM interprets it.
SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


class Positions(NamedTuple):
    limit: int | None  # None: unlimited
    is_table: bool  # a hard limit; otherwise the model was only trained up to it


def positions_of(config: Mapping[str, Any]) -> Positions:
    """The position limit of a config.json."""
    text = config.get("text_config") or config
    kind = str(text.get("model_type"))
    counts = [text[key] for key in KEYS if type(text.get(key)) is int and text[key] > 0]
    if not counts:
        return Positions(None, False)
    count = min(counts)
    if kind in OFFSET_TABLES:
        count -= 2
    is_table = kind in TABLES and not (kind in RELATIVE and not text.get("position_biased_input", True))
    if is_table:
        return Positions(count, True)
    return Positions(int(count * _scale(text)) if "gemma3" not in kind else count, False)


def _scale(text: Mapping[str, Any]) -> float:
    factors = [
        rope["factor"]
        for rope in _ropes(text)
        if rope.get("rope_type", rope.get("type")) not in SCALED
        and isinstance(rope.get("factor"), int | float)
    ]
    return factors[-1] if factors else 1.0


def _ropes(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All rope configs, also if there is one per layer type."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if isinstance(rope, Mapping):
            yield rope
            yield from (inner for inner in rope.values() if isinstance(inner, Mapping))
