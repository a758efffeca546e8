"""Merged checkpoints compute what base and adapter compute together; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from rayrlhf.commands.merge_lora import main
from tests.tiny_model import make_tiny_model, make_tokenizer

IDS = torch.tensor([[1, 5, 40, 60, 2, 70], [1, 90, 12, 33, 210, 2]])
CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def make_adapter(base: str, folder: Path, task: str, *, num_labels: int = 1, **options: Any) -> str:
    """An adapter with random weights, as training leaves it."""
    torch.manual_seed(3)  # of A's start, and of a head's
    labels = {} if task == "CAUSAL_LM" else {"num_labels": num_labels}
    model = CLASSES[task].from_pretrained(base, **labels)
    lora: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type=task, **lora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return str(folder)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize(
    ("task", "num_labels", "options"),
    [
        ("CAUSAL_LM", 0, {}),
        ("CAUSAL_LM", 0, {"use_rslora": True, "target_modules": "all-linear"}),
        ("CAUSAL_LM", 0, {"use_dora": True}),
        ("SEQ_CLS", 1, {}),
        ("TOKEN_CLS", 2, {}),
    ],
)
def test_merged_is_base_plus_adapter(
    tmp_path: Path, task: str, num_labels: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_model(tmp_path / "base")
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7]).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", task, num_labels=num_labels, **options)
    out = tmp_path / "out"
    assert main([adapter, str(out)]) == 0
    assert str(out) in capsys.readouterr().out

    labels = {} if task == "CAUSAL_LM" else {"num_labels": num_labels}
    plain = CLASSES[task].from_pretrained(base, **labels)
    before = logits_of(plain)
    expected = logits_of(PeftModel.from_pretrained(plain, adapter))
    merged = CLASSES[task].from_pretrained(out)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-2, "an adapter that does nothing would prove nothing"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert list(out.glob("*.safetensors")) and not (out / "adapter_config.json").exists()
    if task == "CAUSAL_LM":
        assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
        assert GenerationConfig.from_pretrained(out).temperature == 0.3
    else:
        assert merged.config.num_labels == num_labels
        assert merged.config.pad_token_id == tokenizer.pad_token_id == 0
    assert not list(tmp_path.glob(".out*"))


def test_the_adapters_own_tokenizer_wins_and_a_moved_base_is_given(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", "CAUSAL_LM")
    make_tokenizer("{{ 'mine' }}").save_pretrained(adapter)
    moved = str(shutil.move(base, tmp_path / "moved"))
    assert main([adapter, str(tmp_path / "out"), "--base", moved]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'mine' }}"


def test_a_half_precision_base_stays_one(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", "CAUSAL_LM")
    assert main([adapter, str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_base(folder: Path, **changes: Any) -> str:
    config = LlamaConfig.from_pretrained(make_tiny_model(folder))
    for name, value in changes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_merged_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", "CAUSAL_LM")
    quantized = make_tiny_model(tmp_path / "quantized")
    edit(Path(quantized) / "config.json", quantization_config={"load_in_4bit": True})
    strange = Path(make_adapter(base, tmp_path / "strange", "CAUSAL_LM"))
    edit(strange / "adapter_config.json", task_type=None)
    prompts = tmp_path / "prompts"
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), soft).save_pretrained(str(prompts))
    out = tmp_path / "out"
    wider = other_base(tmp_path / "wider", intermediate_size=320)
    deeper = other_base(tmp_path / "deeper", num_hidden_layers=3)
    shallower = other_base(tmp_path / "shallower", num_hidden_layers=1)
    for words, message in (
        ([str(tmp_path / "none"), str(out)], "no such folder; wanted the folder of a PEFT adapter"),
        ([base, str(out)], "no adapter_config.json (it is a whole checkpoint already)"),
        ([adapter, base], f"OUT={base} exists"),
        ([adapter, str(out), "--base", str(tmp_path / "gone")], "gone is no folder"),
        ([adapter, str(out), "--base", str(tmp_path)], "has no config.json"),
        ([adapter, str(out), "--base", quantized], "is quantized"),
        ([str(strange), str(out)], "task_type=None in adapter_config.json; wanted one of CAUSAL_LM, SEQ_CLS"),
        ([str(prompts), str(out)], "trains prompts"),
        ([adapter, str(out), "--base", wider], "is [4, 256] in the adapter and [4, 320] in the base"),
        (
            [adapter, str(out), "--base", deeper],
            "nothing for base_model.model.model.layers.2",
        ),
        (
            [adapter, str(out), "--base", shallower],
            "no place for base_model.model.model.layers.1",
        ),
    ):
        assert main(words) == 2, message
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
        assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_head_that_nobody_brings_is_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = Path(make_adapter(base, tmp_path / "adapter", "SEQ_CLS"))
    weights = adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "score" not in name}
    save_file(kept, weights)
    assert main([str(adapter), str(tmp_path / "out")]) == 2
    assert "neither the base" in (error := capsys.readouterr().err) and "score.weight" in error
