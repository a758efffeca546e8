"""Nothing is left to chance in a model whose log-probabilities, scores or values are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import LoraConfig, ModelConfig
from rayrlhf.models.dropout import TrainedModule, keep_dropout
from rayrlhf.models.load import checkpoint_activations, load_policy, load_student
from rayrlhf.models.lora import add_adapters
from tests.tiny_model import make_tokenizer

CPU = torch.device("cpu")
LENGTHS = [30, 20]
IDS = torch.randint(8, 264, (50,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its config's own dropout is 0.1 in three places; weights wide enough that each matters."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.1)
    )
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def policy(path: str) -> Any:
    return load_policy(ModelConfig(path=path, dtype="float32"), path, device=CPU, chunk_tokens=16)


def logprobs(module: Any) -> Tensor:
    return module(IDS, position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS), torch.ones(50)).logprobs


def test_9_gpt2_has_no_kl_to_itself(gpt2: str) -> None:
    model = policy(gpt2)
    assert model.training
    trained, again, asked = logprobs(model), logprobs(model), logprobs(model.eval())
    assert trained.requires_grad
    assert torch.equal(trained, again) and torch.equal(trained, asked)  # a ratio of 1 and a KL of 0


def test_9_sft_keeps_the_dropout_of_the_config(gpt2: str) -> None:
    model = policy(gpt2)
    keep_dropout(model)
    assert not torch.allclose(logprobs(model), logprobs(model), atol=0.01)
    assert torch.equal(logprobs(model.eval()), logprobs(model))
    assert not torch.allclose(logprobs(model.train()), logprobs(model), atol=0.01)


def gradients(module: Any) -> list[Tensor]:
    module.zero_grad()
    logprobs(module).sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("drops", [False, True])
def test_9_activations_are_computed_again_in_layers_that_do_not_drop(gpt2: str, drops: bool) -> None:
    model = policy(gpt2)
    if drops:
        keep_dropout(model)
    torch.manual_seed(1)
    plain = gradients(model)
    calls: list[bool] = []
    layers: Any = model.causal_lm.transformer.h
    for layer in layers:
        layer.attn.register_forward_hook(lambda module, *_: calls.append(module.training))
    checkpoint_activations(model.causal_lm)
    model.train()  # as each update does
    torch.manual_seed(1)
    for one, other in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert calls == [drops] * 4  # two layers, each in both passes
    assert all(layer.training for layer in layers)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_9_adapters_keep_theirs(gpt2: str) -> None:
    model = policy(gpt2)
    add_adapters(model.causal_lm, LoraConfig(rank=4, dropout=0.5), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    assert not torch.allclose(logprobs(model), logprobs(model), atol=1e-3)
    assert torch.equal(logprobs(model.eval()), logprobs(model))


def test_9_a_student_is_compared_without(gpt2: str) -> None:
    config = ModelConfig(path=gpt2, dtype="float32")
    student = load_student(config, gpt2, device=CPU, chunk_tokens=16, divergence="forward_kl")
    assert student.training
    assert not any(m.training for m in student.modules() if isinstance(m, nn.Dropout))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FFN = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
EXPERTS = FFN | {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "falcon": SMALL | {"hidden_dropout": 0.5},
    "bloom": SMALL,
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt_neo": SMALL | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gpt_neox": FFN,
    "gpt_bigcode": SMALL,
    "biogpt": SMALL | {"intermediate_size": 48, "layerdrop": 0.5},
    "xglm": {"vocab_size": 64, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48},
    "persimmon": FFN,
    "phi": FFN,
    "stablelm": FFN,
    "mixtral": EXPERTS | {"router_jitter_noise": 0.5},
    "phimoe": EXPERTS | {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5},
    "llama": FFN,
}


class Whole(TrainedModule):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self) -> Tensor:
        return self.decoder(input_ids=torch.arange(4, 14)[None], use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_9_no_family_is_left_to_chance(family: str, recompute: bool) -> None:
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(family, **FAMILIES[family])
    for name in [n for n, value in config.to_dict().items() if "drop" in n and type(value) in (int, float)]:
        setattr(config, name, 0.5)
    decoder: Any = AutoModel.from_config(config, attn_implementation="eager")
    model = Whole(decoder)
    if recompute:
        checkpoint_activations(decoder)
    kept = model.eval()().detach()
    once, again = model.train()(), model()
    assert torch.equal(once, again)
    torch.testing.assert_close(once, kept, rtol=1e-5, atol=1e-6)
    once[..., 0].sum().backward()
    assert decoder.get_input_embeddings().weight.grad.any()
    assert config.to_dict() == decoder.config.to_dict()  # for exports


def test_9_dropped_layers_are_never_dropped() -> None:
    """Ranks that dropped different ones would wait for each other."""
    config: Any = AutoConfig.for_model("opt", **FAMILIES["opt"], dropout=0.0, attention_dropout=0.0)
    model = Whole(AutoModel.from_config(config, attn_implementation="eager"))
    keep_dropout(model)
    assert model.training and torch.equal(model(), model())


def test_9_a_model_with_code_of_its_own_may_compute_activations_again() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gradient_checkpointing = True
            self.dropout = 0.5
            self.layer = nn.Dropout(0.5)

        def forward(self, hidden: Tensor) -> tuple[bool, Tensor]:
            return self.training, self.layer(nn.functional.dropout(hidden, self.dropout, self.training))

    model = Whole(Own()).train()
    recomputes, hidden = model.decoder(torch.ones(100))
    assert recomputes and torch.equal(hidden, torch.ones(100))
