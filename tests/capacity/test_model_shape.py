"""Parameters are counted exactly: published models by hand, every family against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.capacity.model_shape import FAMILIES, KNOWN_SHAPES, ShapeUnknown, read_shape, shape_of

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "head_dim": 24,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},  # experts in the second layer only
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"mlp_only_layers": [1]},
}
NO_HEAD_DIM = ("qwen2", "qwen2_moe")  # always hidden / heads
WITH_VISION = ("qwen2_5_vl", "qwen2_5_vl_text")
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
TOWER |= {"spatial_merge_size": 2, "out_hidden_size": 64}


def test_llama_3_8b_by_hand() -> None:
    # Embedding and output projection 128,256 x 4,096 each; 32 layers of q and o 4,096 x 4,096, k and v
    # 4,096 x 1,024, three projections 4,096 x 14,336 and two norms of 4,096; a last norm.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    by_hand = 2 * 128256 * 4096 + 32 * layer + 4096
    assert by_hand == 8_030_261_248
    assert read_shape("meta-llama/Meta-Llama-3-8B").parameters == by_hand


def test_llama_3_70b_by_hand() -> None:
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    by_hand = 2 * 128256 * 8192 + 80 * layer + 8192
    assert by_hand == 70_553_706_496
    assert read_shape("meta-llama/Meta-Llama-3-70B").parameters == by_hand


def test_mixtral_8x7b_by_hand() -> None:
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert, router = 3 * 4096 * 14336, 8 * 4096
    by_hand = 2 * 32000 * 4096 + 32 * (attention + 8 * expert + router + 2 * 4096) + 4096
    assert by_hand == 46_702_792_704
    shape = read_shape("mistralai/Mixtral-8x7B-v0.1")
    assert shape.parameters == by_hand
    assert shape.active_parameters == by_hand - 32 * 6 * expert  # two of eight experts


def test_qwen3_30b_a3b_by_hand() -> None:
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128
    expert, router = 3 * 2048 * 768, 128 * 2048
    by_hand = 2 * 151936 * 2048 + 48 * (attention + 128 * expert + router + 2 * 2048) + 2048
    assert by_hand == 30_532_122_624
    shape = read_shape("Qwen/Qwen3-30B-A3B")
    assert shape.parameters == by_hand
    assert shape.active_parameters == by_hand - 48 * 120 * expert


def test_qwen2_5_vl_7b_by_hand() -> None:
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    text = 2 * 152064 * 3584 + 28 * layer + 3584
    block = 4 * 1280 * 1280 + 4 * 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    tower = 3 * 2 * 14 * 14 * 1280 + 32 * block + merger
    assert tower == 676_550_144 and text + tower == 8_292_166_656
    shape = read_shape("Qwen/Qwen2.5-VL-7B-Instruct")
    assert shape.parameters == text + tower and shape.vision_parameters == tower
    assert shape.active_parameters == text


@pytest.mark.parametrize(
    "name", ["mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-VL-7B-Instruct"]
)
def test_published_configs_as_transformers_builds_them(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    known = json.loads(KNOWN_SHAPES.read_text())["shapes"]
    values = next(dict(entry["config"]) for entry in known if name in entry["names"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = AutoModelForImageTextToText if "vision_config" in values else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    assert read_shape(name).parameters == count
    assert shape_of(config.to_dict(), name).parameters == count  # saved again, with a nested text_config


@pytest.mark.parametrize("tied", [False, True])
def test_a_vision_tower_counts_as_transformers_builds_it(tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {key: value for key, value in SMALL.items() if key != "head_dim"}
    values = {"text_config": text, "vision_config": TOWER, "tie_word_embeddings": tied}
    config = AutoConfig.for_model("qwen2_5_vl", **values)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    shape = shape_of(config.to_dict(), "x")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision_parameters == sum(p.numel() for p in model.model.visual.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in WITH_VISION])
def test_every_family_as_transformers_builds_it(kind: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    values = {**SMALL, **EXPERTS.get(kind, {}), "tie_word_embeddings": tied}
    if kind in NO_HEAD_DIM:
        del values["head_dim"]
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        classifier = AutoModelForSequenceClassification.from_config(config) if kind != "gemma3_text" else None
    shape = shape_of(config.to_dict(), kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    if classifier is not None:  # with two labels, where ours have one
        assert shape.scorer_parameters == sum(p.numel() for p in classifier.parameters()) - 64


def test_biases_of_llama_count() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict(), "x").parameters == sum(p.numel() for p in model.parameters())


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    assert read_shape(str(tmp_path)).head_dim == 24


def test_a_downloaded_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--something" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", **SMALL}))
    assert read_shape("someone/something").hidden == 64


@pytest.mark.parametrize(
    "config, message",
    [({"model_type": "mamba"}, "model_type 'mamba'"), ({}, "model_type 'None'")],
)
def test_an_unknown_architecture_is_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeUnknown, match=message):
        shape_of(config, "x")


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ShapeUnknown, match=r"nobody/nothing: no config.json there.*download"):
        read_shape("nobody/nothing")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"model_type": "llama"}', '{"model_type": "llama", "num_attention_heads": 0}'],
)
def test_a_broken_config_is_an_error(text: str, tmp_path: Path) -> None:
    """`rayrlhf plan` ended with a traceback."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ShapeUnknown, match=r"its config.json cannot be read|unknown model_type"):
        read_shape(str(tmp_path))
