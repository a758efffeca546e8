"""Architectures: packed, one sequence per stream, or refused; and what is done then is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.commands.architectures_page import COLUMNS, HEAD, Entry, entries, row
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.load import load_critic, load_policy, load_reward_model, load_student, load_teacher
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.probe import TOLERANCE, verdict_of
from rayrlhf.models.small_copy import randomize, small_config
from rayrlhf.models.streams import Streams, decoder_of, hidden_states

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ALONE = "supported one sequence per stream"
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [float(2 + i) for i in range(48)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **FACTORS}


def config(model_type: str, **settings: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**settings)


@pytest.mark.parametrize(
    ("found", "longest", "name", "reason"),
    [
        (config("llama"), 4000, "supported packed", ""),
        (config("mixtral"), 4000, "supported packed", ""),
        (config("mistral", sliding_window=4096), 9000, "supported packed", ""),
        (config("gemma2"), 9000, "supported packed", ""),  # windows and soft caps
        (config("granite", logits_scaling=8.0), 4000, "supported packed", ""),
        (config("hyperclovax", logits_scaling=0.1), 4000, "supported packed", ""),
        (config("falcon_h1", lm_head_multiplier=0.02), 4000, ALONE, "carry state"),
        (config("lfm2", **LFM2), 4000, ALONE, "carry state"),
        (config("llama4_text"), 9000, ALONE, ""),  # chunks, and temperatures by the place in the stream
        (config("gpt_oss"), 4000, ALONE, "our kernel"),
        (config("phi3", rope_parameters=LONGROPE), 4000, "supported packed", ""),
        (config("phi3", rope_parameters=LONGROPE), 5000, ALONE, "rotary frequencies"),
        (config("bert"), 500, "refused", "bidirectional"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_5_verdicts(found: PreTrainedConfig, longest: int, name: str, reason: str) -> None:
    verdict = verdict_of(found, longest=longest)
    assert verdict.name == name and reason in verdict.reason, verdict
    if verdict.streams is not None:
        assert verdict.deviation <= TOLERANCE
    if name == ALONE:
        assert not verdict.packed_deviation <= 100 * TOLERANCE, "one stream would have been right"


def test_5_a_dynamic_rotary_embedding_is_refused_beyond_its_positions() -> None:
    """transformers keeps the frequencies of the longest sequence that it has seen."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    found = config("llama", rope_parameters=rope, max_position_embeddings=2048)
    assert verdict_of(found, longest=2048).name == "supported packed"
    assert "has seen before" in verdict_of(found, longest=2049).reason


def test_5_a_multiplier_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.models.fused_head import LogitScaling

    monkeypatch.setattr("rayrlhf.models.logprobs.logit_scaling", lambda config: LogitScaling())
    verdict = verdict_of(config("granite", logits_scaling=4.5), longest=10)
    assert verdict.name == "refused"
    assert verdict.reason == "it multiplies its logits in a way that is not known here (the copy's by 0.2222)"


def test_5_every_layer_that_shares_sequences_attends_through_our_kernel() -> None:
    assert verdict_of(config("llama"), longest=10).shares_sequences
    assert not verdict_of(config("lfm2", **LFM2), longest=10).shares_sequences


def test_5_the_probe_leaves_the_random_numbers_and_the_config_alone() -> None:
    found = config("llama", vocab_size=300)
    before, state = found.to_json_string(), torch.get_rng_state()
    verdict_of(found, longest=77)
    assert found.to_json_string() == before and torch.equal(torch.get_rng_state(), state)


def test_5_a_small_copy_has_a_layer_of_every_kind() -> None:
    small: Any = small_config(config("gemma3_text"), longest=None)
    assert small.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
    assert small.num_hidden_layers == len(small.layer_types) <= 7
    assert (small.hidden_size, small.sliding_window) == (64, 24)
    within: Any = small_config(config("gemma3_text", sliding_window=512), longest=512)
    assert within.sliding_window == 96


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("hybrid"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(config("lfm2", **LFM2), None))
    randomize(model)
    model.save_pretrained(folder)
    return folder


LENGTHS = [7, 1, 12]


def stream() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 96, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return ids, position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS)


def test_5_a_hybrid_is_trained_as_if_each_sequence_were_alone(hybrid: str) -> None:
    """Log-probabilities and gradients; in one stream, the second sequence read the first."""
    policy = load_policy(ModelConfig(path=hybrid), hybrid, device=CPU, chunk_tokens=8)
    plain = AutoModelForCausalLM.from_pretrained(hybrid, attn_implementation="eager", dtype=torch.float32)
    ids, positions, ends = stream()
    found = policy(ids, positions, ends, torch.ones(len(ids))).logprobs
    parts = []
    for part in ids.split(LENGTHS):
        logprobs = plain(input_ids=part[None]).logits[0].log_softmax(-1)[:-1]
        parts += [torch.zeros(1), logprobs.gather(-1, part[1:, None]).squeeze(-1)]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    torch.cat(parts).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in policy.causal_lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_5_every_model_of_a_hybrid_goes_one_sequence_at_a_time(hybrid: str) -> None:
    model = ModelConfig(path=hybrid)
    critic = load_critic(model, hybrid, device=CPU)
    nn.init.normal_(critic.head.weight)
    ids, positions, ends = stream()
    together = critic(ids, positions, ends)
    alone = [critic(p, position_ids_of([len(p)]), cu_seqlens_of([len(p)])) for p in ids.split(LENGTHS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    student = load_student(model, hybrid, device=CPU, chunk_tokens=8, divergence="forward_kl")
    teacher = load_teacher(model, hybrid, device=CPU, chunk_tokens=8)
    assert student.streams == teacher.streams == critic.streams == Streams(longest_packed=0)
    mask = torch.ones(len(ids))
    answer = student(ids, positions, ends, mask, teacher=teacher(ids, positions, ends, mask))
    policy = load_policy(model, hybrid, device=CPU, chunk_tokens=8)
    torch.testing.assert_close(answer.logprobs, policy(ids, positions, ends, mask).logprobs)
    assert answer.divergence.abs().max() < 1e-5


def test_5_no_reward_model_of_a_hybrid_that_has_no_classifier(hybrid: str) -> None:
    with pytest.raises(ValueError, match="no decoder-style sequence classifier"):
        load_reward_model(ModelConfig(path=hybrid), hybrid, device=CPU)


def test_5_longer_sequences_alone_and_shorter_ones_together(hybrid: str) -> None:
    decoder = decoder_of(load_policy(ModelConfig(path=hybrid), hybrid, device=CPU, chunk_tokens=8).causal_lm)
    calls: list[list[int]] = []
    decoder.register_forward_pre_hook(
        lambda _module, _positional, named: calls.append(named["cu_seq_lens_q"].tolist()), with_kwargs=True
    )
    hidden = hidden_states(decoder, *stream(), Streams(longest_packed=7))
    assert calls == [[0, 7, 8], [0, 12]] and hidden.shape == (20, 64)
    alone = hidden_states(decoder, *stream(), Streams(longest_packed=0))
    torch.testing.assert_close(hidden[8:], alone[8:])  # in its place


def test_5_ranks_that_gather_weights_together_make_equally_many_passes(
    hybrid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 a rank with fewer sequences would leave the others waiting."""
    policy = load_policy(ModelConfig(path=hybrid), hybrid, device=CPU, chunk_tokens=8)
    expected = policy(*stream(), torch.ones(20)).logprobs
    next(policy.parameters()).ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: tensor.fill_(5))
    passes: list[bool] = []
    decoder_of(policy.causal_lm).register_forward_hook(lambda *_: passes.append(True))
    found = policy(*stream(), torch.ones(20)).logprobs
    assert len(passes) == 5
    torch.testing.assert_close(found, expected)


def test_5_packed_models_go_through_in_one_pass(tiny_model: str) -> None:
    policy: PolicyModel = load_policy(ModelConfig(path=tiny_model), tiny_model, device=CPU, chunk_tokens=8)
    passes: list[bool] = []
    decoder_of(policy.causal_lm).register_forward_hook(lambda *_: passes.append(True))
    policy(*stream(), torch.ones(20))
    assert policy.streams == Streams() and len(passes) == 1


def test_5_the_page_has_a_row_for_every_family() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD) and COLUMNS in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    listed = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in rows]
    assert listed == [(f"`{entry.model_type}`", entry.variant) for entry in entries()]
    assert len({name for name, _ in listed}) >= 60
    for line in rows:
        verdict, measured, _, why = (cell.strip() for cell in line.split("|")[3:7])
        assert verdict in ("supported packed", ALONE, "refused")
        assert verdict == "supported packed" or why
        assert verdict == "refused" or float(measured) <= TOLERANCE


def test_5_a_row_of_the_page() -> None:
    assert row(Entry("bert", {})) == (
        "| `bert` |  | refused |  |  | it is bidirectional: its outputs depend on later tokens |"
    )
    assert row(Entry("mamba", {}, "nothing")).startswith(f"| `mamba` | nothing | {ALONE} | ")
