"""What a run leaves for users opens in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.export import (
    export_causal_lm,
    export_reward_model,
    export_step_model,
    padding_token,
)
from rayrlhf.models.heads import ScoreModel, StepModel
from rayrlhf.models.load import (
    load_policy,
    load_reward_model,
    load_scorer,
    load_step_model,
    load_tokenizer,
)
from rayrlhf.models.logprobs import PolicyModel
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model, make_tokenizer

CPU = torch.device("cpu")
LENGTHS = [5, 2, 9]
PAD, EOS = 0, 2


def trained(path: str) -> PolicyModel:
    """A policy whose weights are no longer those of its checkpoint."""
    config = ModelConfig(path=path, dtype="float32")
    policy = load_policy(config, path, device=CPU, chunk_tokens=64)
    shift(policy)
    return policy


@torch.no_grad()
def shift(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def emptied(model: nn.Module) -> dict[str, Tensor]:
    """What the learner gathers from `model`, which then has nothing to save itself, as under ZeRO-3."""
    state = gathered(model)
    for parameter in model.parameters():
        parameter.zero_()
    return state


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """As the learner brings it: copies, of which tied tensors share one."""
    copies: dict[int, Tensor] = {}
    return {
        name: copies.setdefault(id(p), p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


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

    assert ("lm_head.weight" in load_file(export / "model.safetensors")) is not tied
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
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "no other files are left"


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


def trained_reward_model(path: str) -> ScoreModel:
    model = load_reward_model(ModelConfig(path=path, dtype="float32"), path, device=CPU)
    shift(model)
    return model


def rows() -> list[Tensor]:
    """Sequences that end with the end-of-sequence token, as responses do."""
    ids = torch.randint(8, 264, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    ids[torch.tensor(LENGTHS).cumsum(0) - 1] = EOS
    return list(ids.split(LENGTHS))


def packed() -> tuple[Tensor, Tensor, Tensor]:
    return torch.cat(rows()), position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS)


def padded(side: str, token: int = PAD) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows(), batch_first=True, padding_value=token, padding_side=side)
    ones = [torch.ones(n, dtype=torch.long) for n in LENGTHS]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_reward_model_gives_the_same_scores(tied: bool, side: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", tied=tied)
    model = trained_reward_model(source)
    with torch.no_grad():
        scores = model(*packed())
    assert scores.std() > 0.05
    export = tmp_path / "export"
    state = emptied(model)
    export_reward_model(model, state, load_tokenizer(source), export, mean=0.25, std=1.5)

    opened: Any = AutoModelForSequenceClassification.from_pretrained(export)
    assert type(opened).__name__ == "LlamaForSequenceClassification"
    assert opened.dtype == torch.float32
    config = opened.config
    assert (config.num_labels, config.pad_token_id, config.mean, config.std) == (1, PAD, 0.25, 1.5)
    with torch.no_grad():
        found = opened(**padded(side)).logits.squeeze(-1)
    torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)
    again = load_scorer(ModelConfig(path=str(export), dtype="float32"), str(export), device=CPU)
    torch.testing.assert_close(again(*packed()), scores, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(export).chat_template == CHAT_TEMPLATE
    assert "varlen" not in (export / "config.json").read_text()


def test_a_reward_model_without_normalisation_says_nothing_of_it(tiny_model: str, tmp_path: Path) -> None:
    model = trained_reward_model(tiny_model)
    export_reward_model(model, emptied(model), load_tokenizer(tiny_model), tmp_path / "export")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").config
    assert not hasattr(config, "mean") and not hasattr(config, "std")


def test_an_end_of_sequence_token_pads_nothing(tiny_model: str, tmp_path: Path) -> None:
    """If it did, transformers would take it for padding and read the score at the token before."""
    model = trained_reward_model(tiny_model)
    with torch.no_grad():
        scores = model(*packed())
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    export_reward_model(model, emptied(model), tokenizer, tmp_path / "export")
    assert tokenizer.pad_token == "</s>", "the tokenizer of the run is as it was"
    opened: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert opened.config.pad_token_id == saved.pad_token_id == saved.convert_tokens_to_ids("<s>")
    with torch.no_grad():
        found = opened(**padded("left", saved.pad_token_id)).logits.squeeze(-1)
    torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)


def test_tokens_that_may_pad() -> None:
    tokenizer = make_tokenizer()
    assert padding_token(tokenizer) == "<pad>"
    tokenizer.pad_token = None
    assert padding_token(tokenizer) == "<s>"
    tokenizer.bos_token = tokenizer.unk_token = "</s>"
    with pytest.raises(ValueError, match="no special token but '</s>'"):
        padding_token(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_exported_step_model_gives_the_same_logits(side: str, tiny_model: str, tmp_path: Path) -> None:
    config = ModelConfig(path=tiny_model, dtype="float32")
    model: StepModel = load_step_model(config, tiny_model, device=CPU, reward_token_ids=(30, 20))
    shift(model)
    with torch.no_grad():
        logits = model(*packed(), torch.ones(sum(LENGTHS)))
    assert model.head.bias.all()
    export = tmp_path / "export"
    export_step_model(model, emptied(model), load_tokenizer(tiny_model), export, step_token="<|extra|>")

    opened: Any = AutoModelForTokenClassification.from_pretrained(export)
    assert type(opened).__name__ == "LlamaForTokenClassification"
    assert opened.config.num_labels == 2 and opened.config.id2label == {0: "bad", 1: "good"}
    assert opened.config.label2id == {"bad": 0, "good": 1}
    assert opened.config.step_token == "<|extra|>"
    inputs = padded(side)
    with torch.no_grad():
        found = opened(**inputs).logits[inputs["attention_mask"] > 0]
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    again = load_step_model(
        ModelConfig(path=str(export), dtype="float32"), str(export), device=CPU, reward_token_ids=(1, 2)
    )
    with torch.no_grad():
        torch.testing.assert_close(again(*packed(), torch.ones(sum(LENGTHS))), logits, rtol=1e-5, atol=1e-5)


def test_an_incomplete_state_is_refused_and_leaves_the_old_export_alone(
    tiny_model: str, tmp_path: Path
) -> None:
    model = trained_reward_model(tiny_model)
    state = emptied(model)
    del state["decoder.norm.weight"]
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_text("old")
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.norm\.weight"):
        export_reward_model(model, state, load_tokenizer(tiny_model), export)
    assert (export / "model.safetensors").read_text() == "old"
