"""What is wrong with a checkpoint's folder is known from its files and headers, before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.capacity.model_shape import FAMILIES
from rayrlhf.models.folder import folder_problems, has_chat_template, reader_problems
from rayrlhf.models.weight_files import read_heads
from tests.checkpoint_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    safetensors_bytes,
    tensors,
    write_checkpoint,
    write_shards,
)

Spoil = Callable[[Path], Any]


def weights(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        heads = tensors()
        change(heads)
        (folder / "model.safetensors").write_bytes(safetensors_bytes(heads))

    return spoil


def raw(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(text: str) -> Spoil:
    """A file with this header and no data."""
    content = struct.pack("<Q", len(text)) + text.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def config(**changes: Any) -> Spoil:
    return lambda folder: write_checkpoint(folder, **changes)


def settings(**changes: Any) -> Spoil:
    values = {key: value for key, value in {**TOKENIZER_CONFIG, **changes}.items() if value != "absent"}
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(values))


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content)


def tensor(dtype: str, shape: str, offsets: str) -> str:
    return f'{{"x": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'


def added_token(number: int) -> str:
    return json.dumps({**TOKENIZER, "added_tokens": [{"id": number, "content": "x"}]})


CASES: dict[str, tuple[Spoil, str]] = {
    "no weights": (remove("model.safetensors"), "no weights"),
    "empty weights": (raw(lambda _: b""), "model.safetensors has 0 bytes; it is empty"),
    "weights of 5 bytes": (raw(lambda b: b[:5]), "has 5 bytes; it is cut short"),
    "cut within the header": (raw(lambda b: b[:100]), "cut short within its header"),
    "cut within the data": (raw(lambda b: b[:-1]), "cut short:"),
    "more data than the header says": (raw(lambda b: b + b"\0"), "longer than its header says"),
    "a header of petabytes": (raw(lambda b: b"\xff" * 8 + b), "no safetensors file (a header of"),
    "a header that is no JSON": (header("{nonsense"), "its header is no JSON"),
    "a header that is a list": (header("[]"), "its header is no object"),
    "an unknown dtype": (header(tensor('"F7"', "[1]", "[0, 4]")), "entry of x cannot be read"),
    "a negative shape": (header(tensor('"F32"', "[-1]", "[0, 4]")), "x is F32 [-1] but has 4 bytes"),
    "offsets that are no pair": (header(tensor('"F32"', "[1]", "[0]")), "entry of x cannot be read"),
    "a shape without its bytes": (header(tensor('"F32"', "[2]", "[0, 4]")), "x is F32 [2] but has 4 bytes"),
    "a pointer of Git LFS": (raw(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "a shape that is not config.json's": (
        config(vocab_size=17),
        "model.embed_tokens.weight [16, 8] (by config.json [17, 8])",
    ),
    "other heads than config.json's": (
        config(num_key_value_heads=4),
        "model.layers.0.self_attn.k_proj.weight [4, 8] (by config.json [8, 8])",
    ),
    "a layer too few": (config(num_hidden_layers=3), "lack model.layers.2.self_attn.q_proj.weight"),
    "a tensor that is not there": (weights(lambda h: h.pop("lm_head.weight")), "weights lack lm_head.weight"),
    "integers for weights": (
        weights(lambda h: h.update({"model.norm.weight": ("I64", [8])})),
        "weights are I64 in model.norm.weight",
    ),
    "other names": (weights(lambda h: (h.clear(), h.update(x=("F32", [1])))), "no embed_tokens.weight"),
    "config.json that is no JSON": (text("config.json", "{"), "config.json is no JSON"),
    "config.json that is empty": (text("config.json", ""), "config.json is empty"),
    "config.json that is a list": (text("config.json", "[]"), "config.json holds no object"),
    "no model_type": (config(model_type=None), "names no model_type"),
    "a model_type of nowhere": (config(model_type="lama"), "model_type 'lama'"),
    "an encoder": (config(model_type="bert"), "an encoder (model_type bert)"),
    "an encoder-decoder": (config(model_type="t5", is_encoder_decoder=True), "an encoder-decoder"),
    "no hidden_size": (config(hidden_size=None), "config.json has no hidden_size"),
    "no vocabulary": (config(vocab_size=0), "vocab_size=0; wanted an integer > 0"),
    "hidden_size 0": (config(hidden_size=0), "hidden_size=0"),
    "a text for a number": (config(num_hidden_layers="2"), "num_hidden_layers='2'"),
    "heads that do not divide": (
        config(num_attention_heads=3, num_key_value_heads=3),
        "num_attention_heads=3 do not divide",
    ),
    "key-value heads that do not divide": (config(num_key_value_heads=3), "num_key_value_heads=3 do not"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer"),
    "a tokenizer cut short": (raw(lambda b: b[:50], "tokenizer.json"), "tokenizer.json is no JSON"),
    "a tokenizer without a vocabulary": (text("tokenizer.json", "{}"), "has no vocabulary"),
    "a broken tokenizer_config.json": (
        text("tokenizer_config.json", "]"),
        "tokenizer_config.json is no JSON",
    ),
    "no eos": (settings(eos_token="absent"), "no eos_token"),
    "a null eos": (settings(eos_token=None, tokenizer_class="LlamaTokenizer"), "no eos_token"),
    "more tokens than rows": (
        text("tokenizer.json", added_token(16)),
        "ids up to 16, but the embedding has 16",
    ),
    "pickled weights that are empty": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").touch()),
        "pytorch_model.bin is empty",
    ),
    "pickled weights that are text": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_text("<html>")),
        "no file that torch has saved",
    ),
    "an adapter alone": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        "a PEFT adapter without the model under it",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spoilt_checkpoint_is_named_by_its_headers(case: str, tmp_path: Path) -> None:
    spoil, message = CASES[case]
    spoil(write_checkpoint(tmp_path))
    (problem,) = folder_problems("model.path", str(tmp_path), "policy")
    assert problem.path == "model.path" and message in problem.got and str(tmp_path) in problem.got


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
        (remove("model.safetensors.index.json"), "model.safetensors.index.json is missing"),
        (
            raw(lambda b: b[:-4], "model-00001-of-00002.safetensors"),
            "model-00001-of-00002.safetensors is cut",
        ),
        (text("model.safetensors.index.json", "{}"), "no weight_map"),
        (text("model.safetensors.index.json", '{"weight_map": {"x": "../x"}}'), "not in the folder itself"),
        (
            text("model.safetensors.index.json", '{"weight_map": {"y": "model-00001-of-00002.safetensors"}}'),
            "promises y",
        ),
    ],
)
def test_a_spoilt_shard_is_named(spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoil(write_shards(tmp_path))
    (problem,) = folder_problems("model.path", str(tmp_path), "policy")
    assert message in problem.got


def test_good_checkpoints_have_no_problem(tmp_path: Path) -> None:
    assert folder_problems("model.path", str(write_checkpoint(tmp_path / "one")), "policy") == []
    assert folder_problems("model.path", str(write_shards(tmp_path / "shards")), "policy") == []
    scorer = write_checkpoint(
        tmp_path / "scorer", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}
    )
    assert folder_problems("reward.sources.0.path", str(scorer), "scorer") == []
    assert folder_problems("critic.path", str(scorer), "start") == []


def test_what_transformers_saves_is_good(tiny_model: str) -> None:
    assert folder_problems("model.path", tiny_model, "policy") == []
    assert has_chat_template(tiny_model)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    """A new head would score everything 0."""
    (problem,) = folder_problems("reward.sources.0.path", str(write_checkpoint(tmp_path)), "scorer")
    assert "LlamaForCausalLM" in problem.got and "AutoModelForSequenceClassification" in problem.wanted


def test_code_of_its_own_is_not_judged_where_it_is_trusted(tmp_path: Path) -> None:
    folder = str(write_checkpoint(tmp_path, model_type="mine", auto_map={"AutoConfig": "x.X"}))
    (problem,) = folder_problems("model.path", folder, "policy")
    assert "trust_remote_code" in problem.fix
    assert folder_problems("model.path", folder, "policy", trust_remote_code=True) == []


def test_the_headers_of_seventy_billion_parameters_take_milliseconds(tmp_path: Path) -> None:
    """80 layers in 15 shards of 9.4 GB each; the files are sparse, so that they cost no disk."""
    shards = 15
    shape = (8192, 3664)  # x 80 x 29 = 70e9
    names = [f"model.layers.{layer}.x{part}" for layer in range(80) for part in range(29)]
    places = {name: f"model-{index % shards:05}.safetensors" for index, name in enumerate(names)}
    for shard in range(shards):
        entries: dict[str, Any] = {}
        position = 0
        for name in names[shard::shards]:
            end = position + 2 * shape[0] * shape[1]
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        packed = json.dumps(entries).encode()
        with (tmp_path / f"model-{shard:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(packed)) + packed)
            file.truncate(8 + len(packed) + position)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    before = time.process_time()
    problems = folder_problems("model.path", str(tmp_path), "policy", needs_tokenizer=False)
    assert time.process_time() - before < 1.0  # 0.03 s on an idle core
    assert problems == []
    assert len(read_heads(tmp_path / "model-00000.safetensors")) == 155  # of 2,320


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


LANGUAGE_MODELS = [kind for kind in FAMILIES if "_vl" not in kind]  # tests/models/test_vision.py has others


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, "gpt2", "gpt_neox", "phi"])
def test_what_transformers_saves_of_any_family_is_good(kind: str, tied: bool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    values = {**SMALL, **EXPERTS.get(kind, {}), "tie_word_embeddings": tied}
    if kind == "gpt2":
        values = {"vocab_size": 100, "n_embd": 64, "n_head": 4, "n_layer": 2}
    settings = AutoConfig.for_model(kind, **values)
    for dtype in (torch.float32, torch.bfloat16):
        AutoModelForCausalLM.from_config(settings, dtype=dtype).save_pretrained(tmp_path / str(dtype))
        path = str(tmp_path / str(dtype))
        assert folder_problems("model.path", path, "policy", needs_tokenizer=False) == []
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2"):
        settings.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(settings)
        classifier.save_pretrained(tmp_path / "scorer", max_shard_size="20KB")
        path = str(tmp_path / "scorer")
        assert folder_problems("x", path, "scorer", needs_tokenizer=False) == []
        assert folder_problems("x", path, "start", needs_tokenizer=False) == []


def test_17e_every_token_has_a_row_in_each_model_that_reads_it(tmp_path: Path, tiny_model: str) -> None:
    """Of added tokens too, which stand in other files than tokenizer.json."""
    assert reader_problems("ref.path", tiny_model, tiny_model) == []
    policy = tmp_path / "policy"
    shutil.copytree(tiny_model, policy)
    (policy / "added_tokens.json").write_text(json.dumps({"<new>": 264}))
    [problem] = reader_problems("ref.path", tiny_model, str(policy))
    assert problem.path == "ref.path" and "embedding has 264 rows, but it reads ids up to 264" in problem.got
    [problem] = folder_problems("model.path", str(policy), "policy")
    assert "ids up to 264, but the embedding has 264 rows" in problem.got
    (policy / "added_tokens.json").unlink()
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"270": {"content": "<new>"}}
    (policy / "tokenizer_config.json").write_text(json.dumps(settings))
    [problem] = folder_problems("model.path", str(policy), "policy")
    assert "ids up to 270" in problem.got
