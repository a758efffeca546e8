"""How long a sequence a model can read, by its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Positions are rows of a table here: the first one beyond it ends in "index out of range in self".
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
# Whose config.json has the number of positions after scaling: as vLLM takes it.
SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


class Positions(NamedTuple):
    limit: int | None  # None: as many as one likes
    is_table: bool  # one more cannot be read; else it was not trained for more


def positions_of(config: Mapping[str, Any]) -> Positions:
    """Of a config.json."""
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
    """Also those of config.json's with one per kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if isinstance(rope, Mapping):
            yield rope
            yield from (inner for inner in rope.values() if isinstance(inner, Mapping))
