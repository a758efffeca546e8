"""Student against teacher in packed streams and chunks, against plain transformers and plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rayrlhf.algorithms.distill_losses import DISTILL_LOSSES, divergence, top_k_divergence
from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.distill import (
    ChunkedLogits,
    DistillLogprobs,
    DistillModel,
    Teacher,
    TeacherHidden,
    TeacherModel,
    TeacherTopK,
    check_same_vocabulary,
)
from rayrlhf.models.fused_head import LogitScaling
from rayrlhf.models.load import load_policy, load_student, load_teacher
from tests.models.test_logprobs import LargestTensor, gradients, mask_with_holes, tokens
from tests.tiny_model import make_tiny_model

CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 2, 17]
COUNT = sum(LENGTHS)
VOCABULARY = 264
BETA = 0.3
K = 6


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher: other weights, untied."""
    return make_tiny_model(tmp_path_factory.mktemp("teacher"), tied=False, seed=1)


def student_of(path: str, name: str = "forward_kl", chunk_tokens: int = 7, dtype: Any = "float32") -> Any:
    config = ModelConfig(path=path, dtype=dtype)
    return load_student(config, path, device=CPU, chunk_tokens=chunk_tokens, divergence=name, beta=BETA)


def teacher_of(path: str, chunk_tokens: int = 7, dtype: Any = "float32") -> TeacherModel:
    return load_teacher(ModelConfig(path=path, dtype=dtype), path, device=CPU, chunk_tokens=chunk_tokens)


def packed(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    return tokens(sum(lengths)), position_ids_of(lengths), cu_seqlens_of(lengths)


def answer_of(teacher: TeacherModel, kind: str, mask: Tensor, lengths: list[int] = LENGTHS) -> Teacher:
    if kind == "hidden":
        return teacher(*packed(lengths), mask)
    return teacher.top_k(*packed(lengths), mask, K)


def plain_logits(path: str, ids: Tensor, lengths: list[int]) -> tuple[Any, Tensor]:
    """The model, and its logits [T, V] in front of each token, one sequence at a time; 0 in front of first
    tokens.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    parts = []
    for sequence in ids.split(lengths):
        parts += [torch.zeros(1, VOCABULARY), model(input_ids=sequence[None]).logits[0, :-1]]
    return model, torch.cat(parts)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
@pytest.mark.parametrize("name", DISTILL_LOSSES)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_packed_and_chunked_is_plain(
    tiny_model: str, other_model: str, chunk_tokens: int, name: str, kind: str
) -> None:
    mask = mask_with_holes(COUNT)
    upstream = torch.randn(2, COUNT, generator=torch.Generator().manual_seed(2)) / COUNT
    student = student_of(tiny_model, name, chunk_tokens)
    answer = answer_of(teacher_of(other_model, chunk_tokens), kind, mask)
    found: DistillLogprobs = student(*packed(), mask, teacher=answer)
    (upstream[0] * found.logprobs + upstream[1] * found.divergence).sum().backward()

    ids = tokens(COUNT)
    plain, logits = plain_logits(tiny_model, ids, LENGTHS)
    with torch.no_grad():
        of_teacher = plain_logits(other_model, ids, LENGTHS)[1].log_softmax(-1)
    kept = mask * (position_ids_of(LENGTHS) > 0)
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1) * kept
    if kind == "hidden":
        expected = divergence(name, logits, of_teacher, beta=BETA) * kept
    else:
        values, top = of_teacher.topk(K, -1)
        expected = top_k_divergence(name, logits, top, values, beta=BETA) * kept
    (upstream[0] * logprobs + upstream[1] * expected).sum().backward()

    torch.testing.assert_close(found.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.divergence, expected, rtol=1e-5, atol=1e-5)
    assert found.divergence[kept > 0].min() > 0.01
    wanted, got = gradients(plain), gradients(student.causal_lm)
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_logprobs_are_those_of_the_policy(tiny_model: str, other_model: str) -> None:
    mask = mask_with_holes(COUNT)
    student = student_of(tiny_model)
    config = ModelConfig(path=tiny_model, dtype="float32")
    policy = load_policy(config, tiny_model, device=CPU, chunk_tokens=7)
    assert student.state_dict().keys() == policy.state_dict().keys()
    with torch.no_grad():
        found = student(*packed(), mask, teacher=answer_of(teacher_of(other_model), "hidden", mask))
        torch.testing.assert_close(found.logprobs, policy(*packed(), mask).logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISTILL_LOSSES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model: str, name: str) -> None:
    mask = mask_with_holes(COUNT)
    student = student_of(tiny_model, name)
    found = student(*packed(), mask, teacher=answer_of(teacher_of(tiny_model), "hidden", mask))
    found.divergence.sum().backward()
    assert found.divergence.abs().max() < 1e-5
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients(student).values())


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_an_empty_mask_still_gives_every_parameter_a_gradient(
    tiny_model: str, other_model: str, kind: str
) -> None:
    # Under ZeRO-3 a rank without loss tokens must take part in the backward pass of the others.
    for name in DISTILL_LOSSES:
        student = student_of(tiny_model, name)
        answer = answer_of(teacher_of(other_model), kind, torch.zeros(COUNT))
        assert answer[0].size(0) == 0
        found = student(*packed(), torch.zeros(COUNT), teacher=answer)
        assert not found.logprobs.any() and not found.divergence.any()
        (found.logprobs.sum() + found.divergence.sum()).backward()
        assert all(not gradient.any() for gradient in gradients(student).values())


def test_the_head_runs_once_however_many_chunks_there_are(tiny_model: str, other_model: str) -> None:
    student, teacher = student_of(tiny_model, chunk_tokens=2), teacher_of(other_model, chunk_tokens=2)
    calls: list[str] = []
    student.head.register_forward_hook(lambda *_: calls.append("student"))
    teacher.head.register_forward_hook(lambda *_: calls.append("teacher"))
    for mask in (torch.ones(COUNT), torch.zeros(COUNT)):
        student(*packed(), mask, teacher=answer_of(teacher, "top_k", mask))
        assert calls == ["teacher", "student"]
        calls.clear()


def test_a_teacher_is_frozen(other_model: str) -> None:
    teacher = teacher_of(other_model).train()
    assert not teacher.training and not teacher.causal_lm.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not answer_of(teacher, "hidden", torch.ones(COUNT))[0].requires_grad


def test_the_likeliest_tokens(other_model: str) -> None:
    mask = mask_with_holes(COUNT)
    answer = answer_of(teacher_of(other_model), "top_k", mask)
    assert isinstance(answer, TeacherTopK)
    with torch.no_grad():
        _, logits = plain_logits(other_model, tokens(COUNT), LENGTHS)
    kept = (mask > 0) & (position_ids_of(LENGTHS) > 0)
    values, ids = logits.log_softmax(-1)[kept].topk(K, -1)
    assert torch.equal(answer.ids, ids)
    torch.testing.assert_close(answer.logprobs, values, rtol=1e-5, atol=1e-5)


def test_low_precision_models_answer_in_fp32(tiny_model: str, other_model: str) -> None:
    mask = torch.ones(COUNT)
    exact = student_of(tiny_model)(
        *packed(), mask, teacher=answer_of(teacher_of(other_model), "hidden", mask)
    )
    student = student_of(tiny_model, dtype="bfloat16")
    for kind in ("hidden", "top_k"):
        answer = answer_of(teacher_of(other_model, dtype="bfloat16"), kind, mask)
        found = student(*packed(), mask, teacher=answer)
        assert found.logprobs.dtype == found.divergence.dtype == torch.float32
        found.divergence.sum().backward()
        if kind == "hidden":
            torch.testing.assert_close(found.divergence, exact.divergence, rtol=0.1, atol=0.2)


def test_models_that_change_their_logits(tmp_path: Path) -> None:
    """A student and a teacher that cap their logits."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=None,
    )
    paths = [str(tmp_path / name) for name in ("student", "teacher")]
    for path in paths:
        Gemma2ForCausalLM(config).save_pretrained(path)
    mask = torch.ones(COUNT)
    student = student_of(paths[0], "reverse_kl")
    found = student(*packed(), mask, teacher=answer_of(teacher_of(paths[1]), "hidden", mask))
    found.divergence.sum().backward()
    plain, logits = plain_logits(paths[0], tokens(COUNT), LENGTHS)
    with torch.no_grad():
        of_teacher = plain_logits(paths[1], tokens(COUNT), LENGTHS)[1].log_softmax(-1)
    expected = divergence("reverse_kl", logits, of_teacher) * (position_ids_of(LENGTHS) > 0)
    expected.sum().backward()
    torch.testing.assert_close(found.divergence, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(student.causal_lm)[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(0.5, 1.5, 1.3)], ids=["plain", "scaled"])
def test_finite_differences(scaling: LogitScaling, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, offset = leaf(5, 3), leaf(7, 3), leaf(7)
    targets = torch.tensor([0, 6, 3, 3, 1])
    of_teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)

    def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logprobs = logits.log_softmax(-1).gather(-1, targets[rows, None]).squeeze(-1)
        return logprobs, divergence("jsd", logits, of_teacher[rows], beta=0.3)

    def chunked(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return ChunkedLogits.apply(*leaves, *([] if bias else [None]), scaling, 2, of_logits)

    leaves = [hidden, weight, offset] if bias else [hidden, weight]
    assert torch.autograd.gradcheck(chunked, leaves)
    # One chunk or several, and with logits from plain autograd: the same numbers.
    u = F.linear(hidden, weight, offset if bias else None) / scaling.divisor
    capped = u if scaling.softcap is None else scaling.softcap * torch.tanh(u / scaling.softcap)
    expected = of_logits(capped / scaling.temperature, slice(None))
    for got, value in zip(chunked(*leaves), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


def test_only_what_wants_a_gradient_gets_one() -> None:
    def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return logits.logsumexp(-1), logits.sum(-1)

    for kept in range(3):
        leaves = [torch.ones(4, 3), torch.ones(5, 3), torch.ones(5)]
        leaves[kept].requires_grad_()
        first, _ = ChunkedLogits.apply(*leaves, LogitScaling(), 2, of_logits)
        first.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == kept for index in range(3)]


def largest_tensor(student: DistillModel, teacher: TeacherModel, kind: str, lengths: list[int]) -> int:
    """Of the teacher's forward and the student's forward and backward pass with every token in the loss."""
    mask = torch.ones(sum(lengths))
    with LargestTensor() as seen:
        found = student(*packed(lengths), mask, teacher=answer_of(teacher, kind, mask, lengths))
        (found.logprobs + found.divergence).sum().backward()
    return seen.numel


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_no_tensor_over_tokens_and_vocabulary(tiny_model: str, other_model: str, kind: str) -> None:
    lengths = [100, 100, 100]  # 297 loss tokens: more logits than any weight has elements
    loss_logits = 297 * VOCABULARY
    for chunk_tokens, fits in ((50, True), (1000, False)):
        student = student_of(tiny_model, chunk_tokens=chunk_tokens)
        teacher = teacher_of(other_model, chunk_tokens=chunk_tokens)
        assert (largest_tensor(student, teacher, kind, lengths) < loss_logits) is fits


def test_what_does_not_fit_is_refused(tiny_model: str, other_model: str) -> None:
    student, teacher = student_of(tiny_model), teacher_of(other_model)
    mask = mask_with_holes(COUNT)
    answer = answer_of(teacher, "hidden", mask)
    assert isinstance(answer, TeacherHidden)
    with pytest.raises(ValueError, match=r"output is for \d+ tokens; there are 29 loss tokens"):
        student(*packed(), torch.ones(COUNT), teacher=answer)
    with pytest.raises(ValueError, match=r"top_k=265 must be in 1 \.\. 264"):
        teacher.top_k(*packed(), mask, 265)
    with pytest.raises(ValueError, match="'tv' is not one of forward_kl, reverse_kl, jsd"):
        student_of(tiny_model, "tv")


def test_13_vocabularies_are_compared_and_not_sizes() -> None:
    """Qwen2.5 pads one tokenizer to 151,936 and 152,064; Llama-2's and Mistral's have 32,000 tokens each."""
    words = {"a": 0, "b": 1, "c": 2}
    check_same_vocabulary(words, dict(words), student_size=4, teacher_size=8)
    others = {"a": 0, "c": 1, "d": 2}
    with pytest.raises(ValueError, match=r"differ in 3 tokens, such as 'b' with the id 1 and None"):
        check_same_vocabulary(words, others, student_size=3, teacher_size=3)
    with pytest.raises(ValueError, match=r"the teacher has 2 logits, but its tokenizer has ids up to 2"):
        check_same_vocabulary(words, words, student_size=3, teacher_size=2)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_13_heads_that_are_padded_to_other_sizes(
    tiny_model: str, other_model: str, kind: str, padded: str
) -> None:
    """The divergence is that of the tokens which both have."""
    mask = mask_with_holes(COUNT)
    plain = student_of(tiny_model)(*packed(), mask, teacher=answer_of(teacher_of(other_model), kind, mask))
    student, teacher = student_of(tiny_model), teacher_of(other_model)
    model = student if padded == "student" else teacher
    # The same logits, and 8 more. Of the student's padding a trained model never predicts any.
    with torch.no_grad():
        more = model.head.weight.new_zeros(8, model.head.weight.size(1))
        model.head.weight = nn.Parameter(torch.cat([model.head.weight, more]))
        bias = torch.zeros(VOCABULARY + 8)
        bias[VOCABULARY:] = -30.0 if padded == "student" else 30.0
        model.head.bias = nn.Parameter(bias)
        model.head.vocabulary_size = VOCABULARY + 8
    if kind == "hidden":
        answer = teacher(*packed(), mask)
    else:
        answer = teacher.top_k(*packed(), mask, K, student.vocabulary_size)
        assert answer.ids.max() < VOCABULARY
    found = student(*packed(), mask, teacher=answer)
    torch.testing.assert_close(found.divergence, plain.divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logprobs, plain.logprobs, rtol=1e-4, atol=1e-5)
    (found.logprobs + found.divergence).sum().backward()
