"""Checks a checkpoint folder by its files and headers, before anything is loaded.

Pure and fast: it reads JSON and the headers of weights. Models of families known to `capacity.model_shape`
are compared tensor by tensor with their config.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rayrlhf.capacity.model_shape import FAMILIES, ModelShape, shape_of
from rayrlhf.config.base import Problem
from rayrlhf.models.weight_files import BrokenFile, TensorHead, read_json, read_weight_heads

Kind = Literal["policy", "start", "scorer"]  # language model; initial language model or scorer; scorer
FIX = "get the checkpoint again, or name another"
WANTED = "a whole Hugging Face checkpoint"
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COUNTS += ("intermediate_size", "head_dim")
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2")
ENCODERS += ("modernbert", "mpnet", "camembert", "longformer", "big_bird", "nomic_bert", "eurobert")
MAX_NAMED = 3  # tensors in a message


def folder_problems(
    key: str, path: str, kind: Kind, *, trust_remote_code: bool = False, needs_tokenizer: bool = True
) -> list[Problem]:
    """Problems of a local checkpoint; `key` names it in messages. Stops at the first unreadable file."""
    folder = Path(path)

    def problem(got: str, wanted: str = WANTED, fix: str = FIX) -> Problem:
        return Problem(key, f"{path}: {got}", wanted, fix)

    try:
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                fix = f"rayrlhf merge-lora {path} OUT makes a whole one"
                return [problem("a PEFT adapter without the model under it", fix=fix)]
            return [problem("the folder has no config.json", "a Hugging Face checkpoint folder")]
        config = read_json(folder / "config.json")
        found = [problem(*parts) for parts in _config_problems(config, kind, trust_remote_code)]
        if found:
            return found
        heads = read_weight_heads(folder)
        shape = _known_shape(config, path)
        if heads is not None and shape is not None and "quantization_config" not in config:
            found += [problem(got) for got in _tensor_problems(heads, shape, config, kind)]
        if needs_tokenizer:
            rows = _embedding_rows(heads, config)
            found += [problem(*parts) for parts in _tokenizer_problems(folder, rows, trust_remote_code)]
    except BrokenFile as error:
        return [problem(str(error))]
    return found


def has_chat_template(path: str) -> bool:
    """Whether the tokenizer in this folder has a chat template."""
    folder = Path(path)
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if (folder / "additional_chat_templates").is_dir():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def _config_problems(
    config: Mapping[str, Any], kind: Kind, trust_remote_code: bool
) -> Iterator[tuple[str, str, str]]:
    model_type = config.get("model_type")
    own_code = "auto_map" in config
    if not isinstance(model_type, str) or not model_type:
        yield "config.json names no model_type", WANTED, FIX
        return
    if not (own_code and trust_remote_code) and not _is_known(model_type):
        fix = (
            "set model.trust_remote_code=true if you have read its code" if own_code else "take another model"
        )
        yield f"config.json has model_type {model_type!r}", "a model that transformers knows", fix
        return
    if kind != "scorer" and (model_type in ENCODERS or config.get("is_encoder_decoder")):
        what = "an encoder-decoder" if config.get("is_encoder_decoder") else "an encoder"
        yield f"{what} (model_type {model_type})", "a decoder, which can generate", "take another model"
        return
    if kind == "scorer":
        yield from _scorer_problems(config)
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        yield "text_config in config.json is no object", WANTED, FIX
        return
    yield from ((got, WANTED, FIX) for got in _count_problems(text))


def _scorer_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    architectures = config.get("architectures") or []
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures) or count != 1:
        yield (
            f"architectures={architectures} with {count} labels",
            "a reward model: an AutoModelForSequenceClassification checkpoint with num_labels=1, such as "
            "jobs/rm.py exports",
            "name such a folder",
        )


def _count_problems(config: Mapping[str, Any]) -> Iterator[str]:
    needed = COUNTS[:4] if config.get("model_type") in FAMILIES else ()
    for name in COUNTS:
        value = config.get(name)
        if value is None:
            if name in needed:
                yield f"config.json has no {name}"
        elif not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            yield f"config.json has {name}={value!r}; wanted an integer > 0"
    numbers = {name: config.get(name) for name in COUNTS}
    if not all(n is None or (isinstance(n, int) and n > 0) for n in numbers.values()):
        return
    heads, kv_heads, hidden = (
        numbers[n] for n in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if heads and hidden and not numbers["head_dim"] and hidden % heads:
        yield f"config.json has hidden_size={hidden}, which num_attention_heads={heads} do not divide"
    if heads and kv_heads and heads % kv_heads:
        yield f"config.json: num_attention_heads={heads}, which num_key_value_heads={kv_heads} do not divide"


@lru_cache(maxsize=1)
def _auto_classes() -> str:
    """Source text of transformers' tables of model types, which would take seconds to import."""
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto"
    return "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))


def _is_known(model_type: str) -> bool:
    return f'"{model_type}"' in _auto_classes()


def _known_shape(config: Mapping[str, Any], name: str) -> ModelShape | None:
    text = config.get("text_config") or config
    family = FAMILIES.get(str(text.get("model_type")))
    complete = family is not None and text.get(family.expert_size_key) is not None
    if not complete or (family is not None and family.has_experts and "num_experts_per_tok" not in text):
        return None
    return shape_of(config, name)


def _tensor_problems(
    heads: Mapping[str, TensorHead], shape: ModelShape, config: Mapping[str, Any], kind: Kind
) -> Iterator[str]:
    embedding = next((name for name in heads if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        yield f"its weights hold no embed_tokens.weight, which a {config['model_type']} model has"
        return
    prefix = embedding.removesuffix("embed_tokens.weight")
    expected = dict(_expected(shape, prefix))
    architectures = config.get("architectures") or []
    if kind == "policy" and not shape.tied and any(str(a).endswith("ForCausalLM") for a in architectures):
        expected["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    missing = [name for name in expected if name not in heads]
    if missing:
        yield f"its weights lack {_some(missing)}; transformers would initialise them randomly"
    wrong = [name for name, wanted in expected.items() if name in heads and heads[name].shape != wanted]
    if wrong:
        mismatches = [f"{n} {list(heads[n].shape)} (by config.json {list(expected[n])})" for n in wrong]
        yield f"its weights do not fit config.json: {_some(mismatches)}"
    whole = [
        name
        for name in expected
        if name in heads and heads[name].dtype[0] in "IUBC" and heads[name].dtype != "BF16"
    ]
    if whole:
        yield f"its weights are {heads[whole[0]].dtype} in {_some(whole)}; wanted floating-point numbers"


def _expected(shape: ModelShape, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that every family has."""
    yield f"{prefix}embed_tokens.weight", (shape.vocabulary, shape.hidden)
    yield f"{prefix}norm.weight", (shape.hidden,)
    for layer in range(shape.layers):
        at = f"{prefix}layers.{layer}."
        yield f"{at}self_attn.q_proj.weight", (shape.query_size, shape.hidden)
        yield f"{at}self_attn.k_proj.weight", (shape.kv_size, shape.hidden)
        yield f"{at}self_attn.v_proj.weight", (shape.kv_size, shape.hidden)
        yield f"{at}self_attn.o_proj.weight", (shape.hidden, shape.query_size)
        if not shape.experts:
            yield f"{at}mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
            yield f"{at}mlp.up_proj.weight", (shape.intermediate, shape.hidden)
            yield f"{at}mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _embedding_rows(heads: Mapping[str, TensorHead] | None, config: Mapping[str, Any]) -> int | None:
    for name, head in (heads or {}).items():
        if name.endswith(("embed_tokens.weight", "wte.weight")) and len(head.shape) == 2:
            return head.shape[0]
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # which define no special tokens themselves


def _tokenizer_problems(
    folder: Path, embedding_rows: int | None, trust_remote_code: bool
) -> Iterator[tuple[str, str, str]]:
    wanted = "a checkpoint with its tokenizer"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if not trust_remote_code and not any(name.endswith(".tiktoken") for name in os.listdir(folder)):
            yield "no tokenizer (such as tokenizer.json) in it", wanted, "save the tokenizer into the folder"
        return
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    if _has_no_eos(folder, config):
        fix = "set eos_token in its tokenizer_config.json"
        yield "its tokenizer has no eos_token, with which a response ends", wanted, fix
    size = _num_ids(folder)
    if size is not None and embedding_rows is not None and size > embedding_rows:
        yield (
            f"its tokenizer has ids up to {size - 1}, but the embedding has {embedding_rows} rows",
            "a tokenizer whose every token has a row",
            "resize the model's embedding, or save the tokenizer that it was trained with",
        )


def reader_problems(key: str, path: str, tokenizer_path: str) -> list[Problem]:
    """Problems of a model that reads another model's tokens: its embedding needs a row for every id."""
    folder = Path(path)
    config = read_json(folder / "config.json")
    rows, size = _embedding_rows(read_weight_heads(folder), config), _num_ids(Path(tokenizer_path))
    if rows is None or size is None or size <= rows:
        return []
    got = f"{path}: its embedding has {rows} rows, but it reads ids up to {size - 1} of {tokenizer_path}"
    return [Problem(key, got, "a row for every token", "take a model with the tokenizer of model.path")]


def _num_ids(folder: Path) -> int | None:
    """One more than the largest id of a tokenizer; None if no file has it. Raises `BrokenFile`."""
    found = []
    if (folder / "tokenizer.json").is_file():
        found.append(_vocabulary(read_json(folder / "tokenizer.json")))
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            ids = [value for value in read_json(folder / name).values() if isinstance(value, int)]
            found.append(max(ids, default=-1) + 1)
    settings = folder / "tokenizer_config.json"
    added = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    if isinstance(added, Mapping):
        found.append(max((int(key) for key in added if str(key).isdecimal()), default=-1) + 1)
    return max(found, default=None)


def _has_no_eos(folder: Path, config: Mapping[str, Any]) -> bool:
    if config.get("eos_token"):
        return False
    special = folder / "special_tokens_map.json"
    if special.is_file() and read_json(special).get("eos_token"):
        return False
    return "eos_token" in config or config.get("tokenizer_class") in PLAIN_CLASSES


def _vocabulary(tokenizer: Mapping[str, Any]) -> int:
    """One more than the largest id. Raises `BrokenFile`."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping | list):
        raise BrokenFile("tokenizer.json has no vocabulary (model.vocab)")
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]
    ids += [token["id"] for token in added if isinstance(token, Mapping) and "id" in token]
    if not all(isinstance(each, int) for each in ids):
        raise BrokenFile("tokenizer.json has ids that are no integers")
    return max(ids, default=-1) + 1
