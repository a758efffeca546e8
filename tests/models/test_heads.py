"""Scalar heads over packed streams against each sequence alone, and what attention refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MistralConfig,
)

from rayrlhf.algorithms.advantages import gae
from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.attention import VARLEN, VARLEN_SDPA, attention_implementation, packed_inputs
from rayrlhf.models.heads import ScoreModel, StepModel, ValueModel
from rayrlhf.models.load import (
    has_packed_scorer,
    is_sequence_classifier,
    load_critic,
    load_reward_model,
    load_scorer,
    load_step_model,
    resolve_dtype,
    step_head_of,
)
from tests.tiny_model import make_tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # naming a GPU needs none
LENGTHS = [5, 1, 9, 2]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ENCODER: dict[str, Any] = {
    name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
} | {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("classifier"), sequence_classification=True)


@pytest.fixture(scope="module")
def token_classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("token_classifier")
    model: Any = LlamaForTokenClassification(LlamaConfig(**SMALL))  # two labels by default
    nn.init.normal_(model.score.bias)
    model.save_pretrained(path)
    return str(path)


def tokens(count: int) -> Tensor:
    return torch.randint(
        8, 264, (count,), generator=torch.Generator().manual_seed(0)
    )  # no padding among them


def packed(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return ids, position_ids_of(lengths), cu_seqlens_of(lengths)


def fp32(path: str) -> ModelConfig:
    return ModelConfig(path=path, dtype="float32")


def critic_with_random_head(path: str) -> ValueModel:
    critic = load_critic(fp32(path), path, device=CPU)
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(3))
    return critic


def test_a_value_is_read_before_its_token(tiny_model: str) -> None:
    critic = critic_with_random_head(tiny_model)
    ids = tokens(sum(LENGTHS))
    values = critic(*packed(ids, LENGTHS))

    plain = AutoModel.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    expected = []
    for sequence in ids.split(LENGTHS):
        hidden = plain(input_ids=sequence[None]).last_hidden_state[0]  # [t, H]
        after = hidden @ critic.head.weight[0]
        expected += [torch.zeros(1), after[:-1]]
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_value_does_not_know_its_token(tiny_model: str) -> None:
    critic = critic_with_random_head(tiny_model)
    ids = tokens(7)
    changed = ids.clone()
    changed[3] += 1
    values, values_changed = critic(*packed(ids, [7])), critic(*packed(changed, [7]))
    assert (values != values_changed).tolist() == [False] * 4 + [True] * 3


def test_a_critic_starts_at_zero_from_a_language_model(tiny_model: str) -> None:
    critic = load_critic(fp32(tiny_model), tiny_model, device=CPU)
    assert critic.training
    assert not critic(*packed(tokens(6), [4, 2])).any()


def test_a_critic_starts_as_the_reward_model_it_comes_from(classifier: str) -> None:
    critic = load_critic(fp32(classifier), classifier, device=CPU)
    scorer = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    assert torch.equal(critic.head.weight, scorer.score.weight) and critic.head.weight.any()
    # The value before the last token is the score of the sequence without it.
    ids = tokens(6)
    score = scorer(input_ids=ids[None, :-1]).logits.item()
    assert critic(*packed(ids, [6]))[-1].item() == pytest.approx(score, rel=1e-5, abs=1e-5)


def test_a_critic_learns(tiny_model: str) -> None:
    critic = critic_with_random_head(tiny_model)
    critic(*packed(tokens(6), [4, 2])).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters())


def test_scores_are_those_of_the_classifier(classifier: str) -> None:
    scorer = load_scorer(fp32(classifier), classifier, device=CPU)
    assert not scorer.training
    plain = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    ids = tokens(sum(LENGTHS))
    expected = [plain(input_ids=sequence[None]).logits.item() for sequence in ids.split(LENGTHS)]
    assert scorer(*packed(ids, LENGTHS)).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_several_labels_are_refused(tmp_path: Path) -> None:
    config: Any = LlamaConfig(**SMALL)
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 labels; a reward model or critic needs exactly 1"):
        load_scorer(fp32(str(tmp_path)), str(tmp_path), device=CPU)


def test_kinds_of_checkpoints_are_distinguished(tiny_model: str, classifier: str, tmp_path: Path) -> None:
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    encoder = str(tmp_path)
    found = {
        path: (is_sequence_classifier(path), has_packed_scorer(path))
        for path in (tiny_model, classifier, encoder)
    }
    # The second says what its family can do: an encoder has no last token that has seen all others.
    assert found == {tiny_model: (False, True), classifier: (True, True), encoder: (True, False)}


def test_a_reward_model_starts_at_zero_from_a_language_model_and_learns(tiny_model: str) -> None:
    model = load_reward_model(fp32(tiny_model), tiny_model, device=CPU)
    assert model.training and model.head.bias is None and not model(*packed(tokens(6), [4, 2])).any()
    nn.init.normal_(model.head.weight)
    model(*packed(tokens(6), [4, 2])).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_reward_model_goes_on_from_a_reward_model(classifier: str) -> None:
    model = load_reward_model(fp32(classifier), classifier, device=CPU)
    before = load_scorer(fp32(classifier), classifier, device=CPU)
    scores = model(*packed(tokens(6), [4, 2]))
    assert model.training and scores.all()
    assert torch.equal(scores, before(*packed(tokens(6), [4, 2])))


def test_an_encoder_makes_no_reward_model(tmp_path: Path) -> None:
    BertConfig(**ENCODER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no decoder-style sequence classifier for this architecture"):
        load_reward_model(fp32(str(tmp_path)), str(tmp_path), device=CPU)
    with pytest.raises(ValueError, match="no decoder-style token classifier for this architecture"):
        load_step_model(fp32(str(tmp_path)), str(tmp_path), device=CPU)


def step_mask(lengths: list[int]) -> Tensor:
    """Two tokens of the first sequence and the last one of the last."""
    mask = torch.zeros(sum(lengths))
    mask[[1, lengths[0] - 1, -1]] = 1.0
    return mask


def step_model(path: str, reward_token_ids: tuple[int, int] | None = None) -> StepModel:
    return load_step_model(fp32(path), path, device=CPU, reward_token_ids=reward_token_ids)


def test_a_step_model_starts_as_the_language_model(tiny_model: str) -> None:
    ids, mask = tokens(sum(LENGTHS)), step_mask(LENGTHS)
    model = step_model(tiny_model, (30, 20))
    logits = model(*packed(ids, LENGTHS), mask)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    whole = [plain(input_ids=sequence[None]).logits[0] for sequence in ids.split(LENGTHS)]  # [t, V] each
    assert model.training and logits.abs().min() > 0.01
    torch.testing.assert_close(logits, torch.cat(whole)[mask > 0][:, [30, 20]], rtol=1e-5, atol=1e-5)
    assert not step_model(tiny_model)(*packed(ids, LENGTHS), mask).any()


def test_a_step_model_goes_on_from_a_token_classifier(token_classifier: str) -> None:
    ids, mask = tokens(sum(LENGTHS)) % 64, step_mask(LENGTHS)
    model = step_model(token_classifier)
    plain: Any = AutoModelForTokenClassification.from_pretrained(token_classifier, dtype=torch.float32).eval()
    whole = [plain(input_ids=sequence[None]).logits[0] for sequence in ids.split(LENGTHS)]  # [t, 2] each
    logits = model(*packed(ids, LENGTHS), mask)
    torch.testing.assert_close(logits, torch.cat(whole)[mask > 0], rtol=1e-5, atol=1e-5)
    assert model.training and torch.equal(model.head.bias, plain.score.bias) and model.head.bias.all()


@pytest.mark.parametrize("mask", [torch.zeros(6), step_mask([4, 2])], ids=["nothing to learn", "three steps"])
def test_every_parameter_of_a_step_model_has_a_gradient(tiny_model: str, mask: Tensor) -> None:
    # Under ZeRO-3 a rank without steps must take part in the backward pass of the others.
    model = step_model(tiny_model, (30, 20))
    logits = model(*packed(tokens(6), [4, 2]), mask)
    assert logits.shape == (int(mask.sum()), 2)
    logits[:, 1].sum().backward()
    has_loss = bool(mask.any())
    assert all(p.grad is not None and bool(p.grad.any()) is has_loss for p in model.parameters())


def test_a_step_head_takes_over_scaled_logits() -> None:
    """Cohere multiplies its logits by a constant: so does the head that gives two of them."""
    plain: Any = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, bos_token_id=1, eos_token_id=2))
    ids = tokens(5)[None] % 64
    hidden = plain.get_decoder()(input_ids=ids).last_hidden_state
    expected = plain(input_ids=ids).logits[..., [3, 4]]
    torch.testing.assert_close(step_head_of(plain, (3, 4))(hidden), expected, rtol=1e-5, atol=1e-6)


def test_what_no_linear_head_can_start_from_is_refused(tiny_model: str, tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, final_logit_softcapping=30.0, attn_logit_softcapping=None)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a linear function"):
        step_model(str(tmp_path), (3, 4))
    assert not step_model(str(tmp_path))(*packed(tokens(6) % 64, [4, 2]), torch.ones(6)).any()
    for wrong in [(20, 20), (20, 264), (-1, 20)]:
        with pytest.raises(ValueError, match="wanted two different ones below 264"):
            step_model(tiny_model, wrong)


def test_a_step_model_has_two_labels(tmp_path: Path) -> None:
    config: Any = LlamaConfig(**SMALL)
    config.num_labels = 3
    LlamaForTokenClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 3 labels; .* needs exactly 2"):
        step_model(str(tmp_path))


def test_dtypes_follow_the_device() -> None:
    assert (resolve_dtype("auto", CPU), resolve_dtype("auto", CUDA)) == (torch.float32, torch.bfloat16)
    assert (resolve_dtype("bfloat16", CPU), resolve_dtype("float32", CUDA)) == (torch.bfloat16, torch.float32)


def test_flash_attention_needs_a_gpu() -> None:
    assert attention_implementation("auto", CPU) == attention_implementation("sdpa", CPU) == VARLEN_SDPA
    with pytest.raises(ValueError, match=r"flash_attention_2 needs a CUDA GPU .* use model\.attention=auto"):
        attention_implementation("flash_attention_2", CPU)


def test_flash_attention_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_implementation("auto", CUDA) == VARLEN, "torch's own, without the package"
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name == "flash_attn.flash_attn_interface" or None
    )
    assert attention_implementation("auto", CUDA) == "flash_attention_2"
    assert attention_implementation("sdpa", CUDA) == VARLEN_SDPA


def test_flash_attention_4_is_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention_implementation("auto", CUDA) == VARLEN


def decoder_of(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_SDPA).get_decoder()


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=4),
        Gemma2Config(
            **SMALL, attn_logit_softcapping=0.5, sliding_window=3, layer_types=["sliding_attention"]
        ),
        Gemma2Config(**SMALL, attn_logit_softcapping=0.5, layer_types=["full_attention"]),
    ],
)
def test_5_windows_and_caps_are_those_of_the_model_alone(config: Any) -> None:
    """A window holds the token itself and those before it."""
    plain_config = copy.deepcopy(config)
    decoder = decoder_of(config)
    plain = AutoModelForCausalLM.from_config(plain_config, attn_implementation="eager").get_decoder()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(decoder.state_dict())
    lengths = [4, 9, 1, 5]
    ids = torch.arange(sum(lengths))
    found = decoder(**packed_inputs(*packed(ids, lengths))).last_hidden_state[0]
    expected = [plain(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_call_without_boundaries_is_refused(tiny_model: str) -> None:
    # Without them, every sequence of the stream would attend to those before it.
    decoder = load_critic(fp32(tiny_model), tiny_model, device=CPU).decoder
    with pytest.raises(ValueError, match="needs cu_seq_lens_q"):
        decoder(input_ids=tokens(4)[None])


class SlowCurve(nn.Module):
    """A decoder in bfloat16 whose hidden states let values rise slowly to about 5."""

    def __init__(self, length: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        along = torch.linspace(4, 5, length)[:, None] + 0.1 * torch.randn(length, 64, generator=generator)
        self.hidden = along.bfloat16()[None]  # [1, T, H]

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)


def test_17_values_leave_the_head_in_fp32() -> None:
    """GAE is of differences of values, which are smaller than a bfloat16's steps at 5 (1/32)."""
    length = 400
    decoder = SlowCurve(length)
    head = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(head.weight, 1 / 64)
    inputs = packed(tokens(length), [length])

    def advantages(values: Tensor) -> Tensor:
        zeros, mask = torch.zeros(length), torch.ones(length)
        return gae(zeros, values, mask, inputs[2], gamma=1.0, lam=0.0)[0][1:-1].double()  # not the ends

    after = (decoder.hidden[0].double() @ head.weight[0].double()).float()
    exact = advantages(torch.cat([torch.zeros(1), after[:-1]]))
    in_bfloat16 = head(decoder.hidden[0]).squeeze(-1).float()
    rounded = advantages(torch.cat([torch.zeros(1), in_bfloat16[:-1]]))
    found = ValueModel(decoder, head)(*inputs)
    assert found.dtype == torch.float32
    size = exact.square().mean().sqrt()
    assert (rounded - exact).square().mean().sqrt() > 0.2 * size  # what bfloat16 would make of it
    assert (advantages(found) - exact).square().mean().sqrt() < 1e-4 * size


@pytest.mark.parametrize("kind", ["score", "step"])
def test_17_scores_leave_their_heads_in_fp32(kind: str) -> None:
    decoder = SlowCurve(6)
    head = nn.Linear(64, 1 if kind == "score" else 2, dtype=torch.bfloat16)
    inputs = packed(tokens(6), [4, 2])
    if kind == "score":
        found, read = ScoreModel(decoder, head)(*inputs), decoder.hidden[0, [3, 5]]
    else:
        mask = torch.tensor([0.0, 0, 1, 0, 0, 1])
        found, read = StepModel(decoder, head)(*inputs, mask), decoder.hidden[0, [2, 5]]
    exact = read.double() @ head.weight.double().T + head.bias.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().view_as(exact), exact, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
