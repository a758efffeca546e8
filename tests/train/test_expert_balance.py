"""The balance loss of a mixture of experts is that of transformers, however the step is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rayrlhf.algorithms.balance_loss import balance_loss, expert_counts
from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, cu_seqlens_of, pack_examples, padding_samples, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.distill import TeacherHidden, TeacherTopK
from rayrlhf.models.fused_head import LogitScaling
from rayrlhf.models.load import checkpoint_activations, load_policy, load_student
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.streams import decoder_of
from rayrlhf.samples import Example, TokenSequence
from rayrlhf.supervised.kd import DistillBatch
from rayrlhf.train.expert_balance import ExpertBalance, ExpertLoad
from rayrlhf.train.learner import Term
from tests.plain_engine import PlainLearner
from tests.tiny_families import make_family

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
LENGTHS = (9, 14, 5)
COEF = 0.5
SEQUENCES = [torch.randint(8, 264, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_family(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def policy_of(folder: str) -> PolicyModel:
    model = ModelConfig(path=folder, dtype="float32")
    policy = load_policy(model, folder, device=torch.device("cpu"), chunk_tokens=7).double()
    policy.causal_lm.set_experts_implementation("eager")  # the grouped kernel has no float64
    return policy


def packed(sequences: list[Tensor]) -> PackedBatch:
    lengths = [len(ids) for ids in sequences]
    mask = torch.cat([torch.arange(n) >= n // 2 for n in lengths]).float()
    return PackedBatch(torch.cat(sequences), position_ids_of(lengths), cu_seqlens_of(lengths), mask)


def forward(engine: Any, batch: PackedBatch) -> Tensor:
    """Hidden states: the head computes in fp32."""
    policy = engine.module
    decoder = decoder_of(policy.causal_lm)
    return policy.decode(decoder, batch.input_ids, batch.position_ids, batch.cu_seqlens)[0]


def no_loss(hidden: Tensor, _batch: PackedBatch) -> tuple[Tensor, Metrics]:
    return 0.0 * hidden.sum(), Metrics()


def after_a_step(
    folder: str, batches: list[PackedBatch], *, checkpointing: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of the balance loss alone, and the step's metrics."""
    policy = policy_of(folder)
    if checkpointing:
        checkpoint_activations(policy.causal_lm)
    learner = PlainLearner(
        policy, TrainConfig(num_steps=10, max_grad_norm=0.0), aux_loss_coef=COEF, is_frozen=True
    )
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update(
            {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        )

    learner.engine.optimizer.register_step_pre_hook(keep)
    metrics = learner.update(Term(batches, forward, no_loss), step=0)
    return gradients, metrics.results()


def own_loss(folder: str, sequences: list[Tensor]) -> tuple[Tensor, Any]:
    """The model's router logits of each sequence alone, through transformers' loss or, where it has none, the
    formula; with the model, whose gradient it has.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    if model.config.model_type != "deepseek_v3":
        each = [
            model(input_ids=ids[None], output_router_logits=True, use_cache=False).router_logits
            for ids in sequences
        ]
        logits: Any = tuple(torch.cat(of_layer) for of_layer in zip(*each, strict=True))
        loss: Any = load_balancing_loss_func(logits, logits[0].size(-1), model.config.num_experts_per_tok)
        return loss, model
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: seen.append((out[0].sigmoid(), out[2])))
    for ids in sequences:
        model(input_ids=ids[None], use_cache=False)
    scores = torch.cat([s / s.sum(-1, keepdim=True) for s, _ in seen]).double()
    chosen = torch.cat([c for _, c in seen])
    frequency = torch.nn.functional.one_hot(chosen, 8).sum(1).double().mean(0)
    return 8 * (frequency * scores.mean(0)).sum(), model


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(each.abs().max()) for each in wanted.values())
    for name, each in wanted.items():
        assert float((found[name] - each).abs().max()) < tolerance * scale, name


def test_it_is_that_of_transformers_on_single_sequences(folder: str) -> None:
    """Value and gradient, in float64; transformers' own sums and DeepSeek's scores are in fp32."""
    for ids in SEQUENCES:
        loss, model = own_loss(folder, [ids])
        (COEF * loss).backward()
        wanted = {f"causal_lm.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients, metrics = after_a_step(folder, [packed([ids])])
        assert metrics["loss/actor_balance"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics["loss/actor"] == pytest.approx(COEF * loss.item(), rel=1e-6)
        touched = {name: grad for name, grad in gradients.items() if float(grad.abs().max()) > 0}
        assert_same(touched, {k: v for k, v in wanted.items() if float(v.abs().max()) > 0}, 1e-6)


def test_neither_packing_nor_micro_batches_make_a_difference(folder: str) -> None:
    """Of the loss over all sequences of the step, which is not the mean of the sequences' losses."""
    loss, _ = own_loss(folder, SEQUENCES)
    alone = [own_loss(folder, [ids])[0].item() for ids in SEQUENCES]
    assert abs(sum(alone) / len(alone) - loss.item()) > 1e-3
    one, metrics = after_a_step(folder, [packed(SEQUENCES)])
    assert metrics["loss/actor_balance"] == pytest.approx(loss.item(), rel=1e-6)
    divisions = {
        "one each": [packed([ids]) for ids in SEQUENCES],
        "with padding": [packed(SEQUENCES[:2]), padding_samples(), packed(SEQUENCES[2:])],
        "another order": [packed(SEQUENCES[2:]), packed(SEQUENCES[:2])],
    }
    for batches in divisions.values():
        found, again = after_a_step(folder, batches, checkpointing=len(batches) == 2)
        assert again == pytest.approx(metrics, rel=1e-6)
        assert_same(found, one, 1e-6)


def test_the_loss_and_the_load_by_hand() -> None:
    """Three rows, two of four experts each."""
    scores = torch.tensor(
        [[0.5, 0.3, 0.1, 0.1], [0.4, 0.1, 0.4, 0.1], [0.6, 0.2, 0.1, 0.1]], dtype=torch.float64
    )
    chosen = torch.tensor([[0, 1], [0, 2], [1, 0]])
    counts = expert_counts(chosen, 4)
    assert counts.tolist() == [3, 2, 1, 0]
    # f = 1, 2/3, 1/3, 0; P = 0.5, 0.2, 0.2, 0.1: 4 · (0.5 + 0.4/3 + 0.2/3) = 2.8
    assert float(balance_loss(scores, counts, 3.0)) == pytest.approx(2.8)
    parts = [balance_loss(scores[:1], counts, 3.0), balance_loss(scores[1:], counts, 3.0)]
    assert float(sum(parts)) == pytest.approx(2.8)
    even = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert float(balance_loss(even, torch.full((4,), 2.0), 4.0)) == pytest.approx(2.0), "K, if balanced"
    load = ExpertLoad(torch.stack([counts, torch.tensor([2.0, 2.0, 1.0, 1.0])]), 6.0)
    assert load.max_over_mean == pytest.approx((2.0 + 4 / 3) / 2)
    assert load.unused_fraction == 1 / 8


def test_dense_and_unknown_models_have_none(tiny_model: str, tmp_path: Path) -> None:
    dense = policy_of(tiny_model)
    assert not ExpertBalance.of(dense, 0.0).layers
    with pytest.raises(ValueError, match=r"model.aux_loss_coef=0.01, .* no mixture-of-experts layers"):
        ExpertBalance.of(dense, 0.01)


@pytest.mark.parametrize("kind", ["hidden", "top k"])
def test_a_student_is_counted_without_its_teacher(kind: str, tmp_path: Path) -> None:
    """Two micro-batches, so that the load is counted first, where no token has a loss."""
    model = ModelConfig(path=make_family(tmp_path / "mixtral", "mixtral"), dtype="float32")
    student = load_student(
        model, model.path, device=torch.device("cpu"), chunk_tokens=64, divergence="forward_kl"
    )

    def with_teacher(ids: Tensor) -> DistillBatch:
        batch = pack_examples([Example(0, (TokenSequence(ids.tolist(), [0, *[1] * (len(ids) - 1)]),))])
        count = len(ids) - 1
        teacher: Any = TeacherTopK(torch.arange(2).expand(count, 2), torch.full((count, 2), -0.7))
        if kind == "hidden":
            weight = torch.randn(264, 8)
            teacher = TeacherHidden(torch.randn(count, 8), weight, None, LogitScaling(1.0, None))
        return DistillBatch(**vars(batch), teacher=teacher)

    def forward_student(engine: Any, batch: Any) -> Tensor:
        tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
        return engine(*tokens, teacher=batch.teacher).divergence

    learner = PlainLearner(student, TrainConfig(num_steps=10), aux_loss_coef=COEF)
    term = Term(
        [with_teacher(ids) for ids in SEQUENCES], forward_student, lambda each, _: (each.sum(), Metrics())
    )
    metrics = learner.update(term, step=0).results()
    assert 2.0 <= metrics["loss/actor_balance"] < 4.0
