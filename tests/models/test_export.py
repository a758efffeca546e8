"""What a run leaves for users opens in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.load import load_policy, load_tokenizer
from rayrlhf.models.logprobs import PolicyModel
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model


def trained(path: str) -> PolicyModel:
    """A policy whose weights are no longer those of its checkpoint."""
    config = ModelConfig(path=path, dtype="float32")
    policy = load_policy(config, path, device=torch.device("cpu"), chunk_tokens=64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return policy


def gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    """As the learner brings it: a copy per name, so that tied tensors no longer share their memory."""
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_the_policy(tied: bool, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", tied=tied)
    policy = trained(source)
    ids = torch.arange(40, 52)
    with torch.no_grad():
        ours = policy(ids, position_ids_of([12]), cu_seqlens_of([12]), torch.ones(12)).logprobs[1:]
    expected = gathered(policy.causal_lm)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # under ZeRO-3 the module itself has nothing to save
    export = tmp_path / "export"
    export_causal_lm(policy.causal_lm, expected, load_tokenizer(source), export)

    opened: Any = AutoModelForCausalLM.from_pretrained(export)
    assert opened.dtype == torch.float32 and opened.state_dict().keys() == expected.keys()
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    embeddings, head = opened.get_input_embeddings().weight, opened.get_output_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) is tied

    with torch.no_grad():
        logprobs = (
            opened(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)
        )
    torch.testing.assert_close(ours, logprobs, rtol=1e-5, atol=1e-5)


def test_an_export_is_complete_and_needs_nothing_of_ours(tiny_model: str, tmp_path: Path) -> None:
    policy = trained(tiny_model)
    export = tmp_path / "export"
    export_causal_lm(policy.causal_lm, gathered(policy.causal_lm), load_tokenizer(tiny_model), export)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in export.iterdir()
    }
    assert "varlen" not in (export / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>hi</s><|assistant|>"
    assert tokenizer.decode(tokenizer("hé", add_special_tokens=False)["input_ids"]) == "hé"


def test_an_export_replaces_the_old_one_whole(tiny_model: str, tmp_path: Path) -> None:
    policy = trained(tiny_model)
    export = tmp_path / "export"
    export.mkdir()
    (export / "of-an-older-run.safetensors").touch()
    export_causal_lm(policy.causal_lm, gathered(policy.causal_lm), load_tokenizer(tiny_model), export)
    assert not (export / "of-an-older-run.safetensors").exists()
    assert (export / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "nothing is left beside it"


def test_a_failed_export_leaves_the_old_one_alone(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_arguments: object, **_options: object) -> None:
        raise OSError("no space left on device")

    policy = trained(tiny_model)
    monkeypatch.setattr(type(policy.causal_lm), "save_pretrained", disk_full)
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_text("old")
    with pytest.raises(OSError, match="no space"):
        export_causal_lm(policy.causal_lm, {}, load_tokenizer(tiny_model), export)
    assert (export / "model.safetensors").read_text() == "old"
