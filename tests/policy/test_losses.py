"""The losses of one optimizer step, by hand, on five tokens of two sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.algorithms.metrics import Max, Mean, Metrics, Sum
from rayrlhf.batch import PolicyBatch, pack_samples, pack_values
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.observe.metric_keys import METRICS
from rayrlhf.policy.losses import (
    LossCounts,
    PolicyObjective,
    TextObjective,
    ValueObjective,
    loss_counts,
    policy_forward,
    value_forward,
)
from rayrlhf.train.collectives import Ranks
from tests.samples import make_prompt, make_sample

ONE_TOKEN_PROMPT = make_prompt([7])
# Twice as much as here: another micro-batch or rank has the rest.
COUNTS = LossCounts(tokens=6.0, sequences=4.0)
GARBAGE = 99.0  # what stands on prompt tokens must not matter


def batch_of(*response_tokens: int) -> PolicyBatch:
    return pack_samples([make_sample(range(tokens), prompt=ONE_TOKEN_PROMPT) for tokens in response_tokens])


def five_tokens() -> PolicyBatch:
    """Loss tokens are 1, 2 and 4, with advantages 1, -2 and 2."""
    return replace(
        batch_of(2, 1),
        advantages=torch.tensor([GARBAGE, 1.0, -2.0, GARBAGE, 2.0]),
        rollout_logprobs=torch.tensor([0.0, -1.5, -2.25, 0.0, -0.5]),
    )


def output(logprobs: tuple[float, ...] = (GARBAGE, -1.0, -2.0, GARBAGE, -0.5)) -> TokenLogprobs:
    entropy = torch.tensor([GARBAGE, 2.0, 1.0, GARBAGE, 3.0])
    return TokenLogprobs(torch.tensor(logprobs, requires_grad=True), entropy.requires_grad_())


REF = torch.tensor([GARBAGE, -1.5, -1.0, GARBAGE, -0.5])  # Δ = 0.5, -1 and 0


def objective(
    batch: PolicyBatch, out: TokenLogprobs, *, kl_coef: float = 0.2, **fields: Any
) -> tuple[Tensor, Metrics]:
    config = AlgorithmConfig.model_validate(fields)
    share, metrics = PolicyObjective(config, COUNTS, kl_coef, constant_length=10.0)(out, batch)
    assert set(metrics) <= set(METRICS), "every metric is documented"
    return share, metrics.on_host()


def total(metrics: Metrics, key: str) -> float:
    """The sum over the loss tokens that a mean over them is made of."""
    metric = metrics[key]
    assert isinstance(metric, Mean) and metric.weight == 3.0
    return float(metric.total)


def largest(metrics: Metrics, key: str) -> float:
    metric = metrics[key]
    assert isinstance(metric, Max)
    return float(metric.value)


def gradient(tensor: Tensor) -> list[float]:
    assert tensor.grad is not None
    return tensor.grad.tolist()


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", -1 / 6),  # on-policy the loss is -A: (-1 + 2 - 2)/6
        ("sequence_mean", (0.5 - 2.0) / 4),  # means 0.5 and -2, over 4 sequences
        ("sequence_sum_norm", -1 / 10 / 4),  # over the longest response and 4 sequences
    ],
)
def test_the_policy_loss_by_hand(aggregation: str, expected: float) -> None:
    out = output()
    share, metrics = objective(five_tokens(), out, aggregation=aggregation)
    assert share.item() == pytest.approx(expected)
    assert total(metrics, "loss/ratio") == 3.0 and total(metrics, "loss/clip_fraction") == 0.0
    assert total(metrics, "loss/entropy") == 6.0
    assert "kl/mean" not in metrics, "without a reference there is no KL"


def test_a_single_update_needs_no_old_logprobs() -> None:
    """The ratio is 1 by value, and its gradient is -A, as with old log-probabilities from a pass before."""
    out, with_old = output(), output()
    objective(five_tokens(), out)[0].backward()
    objective(replace(five_tokens(), old_logprobs=output().logprobs.detach()), with_old)[0].backward()
    assert gradient(out.logprobs) == pytest.approx([0, -1 / 6, 2 / 6, 0, -2 / 6])
    assert gradient(with_old.logprobs) == gradient(out.logprobs)


def test_the_ratio_is_to_the_old_policy() -> None:
    # Ratios e^0.1 = 1.105, e^-0.1 = 0.905 and e^1 = 2.718: the last is clipped at 1.2.
    out = output((GARBAGE, -0.9, -2.1, GARBAGE, 0.5))
    batch = replace(five_tokens(), old_logprobs=torch.tensor([GARBAGE, -1.0, -2.0, GARBAGE, -0.5]))
    share, metrics = objective(batch, out)
    share.backward()
    assert share.item() == pytest.approx((-1.1051709 + 2 * 0.9048374 - 2 * 1.2) / 6)
    assert total(metrics, "loss/clip_fraction") == 1.0
    assert gradient(out.logprobs) == pytest.approx([0, -1.1051709 / 6, 2 * 0.9048374 / 6, 0, 0])


def test_kl_in_the_loss() -> None:
    out = output()
    batch = replace(five_tokens(), ref_logprobs=REF)
    share, metrics = objective(batch, out, kl_in="loss", kl_estimator="k2")
    share.backward()
    # k2 = Δ²/2: 0.125, 0.5 and 0; its gradient is Δ.
    assert share.item() == pytest.approx((-1 + 0.2 * 0.625) / 6)
    assert total(metrics, "kl/mean") == pytest.approx(0.625)
    assert gradient(out.logprobs) == pytest.approx([0, (-1 + 0.2 * 0.5) / 6, (2 - 0.2) / 6, 0, -2 / 6])


def test_kl_in_the_reward_is_only_measured() -> None:
    share, metrics = objective(replace(five_tokens(), ref_logprobs=REF), output(), kl_in="reward")
    assert share.item() == pytest.approx(-1 / 6)
    assert total(metrics, "kl/mean") == pytest.approx(-0.5)  # k1: 0.5 - 1 + 0


def test_the_entropy_bonus() -> None:
    out = output()
    share, metrics = objective(five_tokens(), out, entropy_coef=0.1)
    share.backward()
    assert share.item() == pytest.approx((-1 - 0.1 * 6) / 6)
    assert total(metrics, "loss/entropy") == 6.0
    assert gradient(out.entropy) == pytest.approx([0, -0.1 / 6, -0.1 / 6, 0, -0.1 / 6])


def test_the_engines_logprobs_are_compared_with_the_trainers() -> None:
    _, metrics = objective(five_tokens(), output())  # |-1 + 1.5| = 0.5, |-2 + 2.25| = 0.25, 0
    assert total(metrics, "rollout/logprob_diff_mean") == pytest.approx(0.75)
    assert largest(metrics, "rollout/logprob_diff_max") == pytest.approx(0.5)


@pytest.mark.parametrize(
    "correction, weights",
    [
        # old - rollout = 0.5, 0.25 and 0: w = 1.6487, 1.2840 and 1
        ({"mode": "truncate", "high": 1.5}, [1.5, 1.2840254, 1.0]),
        ({"mode": "mask", "low": 0.5, "high": 1.5}, [0.0, 1.2840254, 1.0]),
        # Of the first sequence e^0.75 = 2.117 for both tokens
        ({"mode": "truncate", "level": "sequence", "high": 2.0}, [2.0, 2.0, 1.0]),
    ],
)
def test_the_rollout_correction_weighs_the_policy_loss_alone(
    correction: dict[str, Any], weights: list[float]
) -> None:
    out = output()
    batch = replace(five_tokens(), ref_logprobs=REF)
    share, metrics = objective(
        batch, out, rollout_correction=correction, kl_in="loss", kl_estimator="k2", entropy_coef=0.1
    )
    share.backward()
    loss = sum(-a * w for a, w in zip([1.0, -2.0, 2.0], weights, strict=True))
    assert share.item() == pytest.approx((loss + 0.2 * 0.625 - 0.1 * 6) / 6, rel=1e-5)
    first, second, third = weights
    expected = [0, (-first + 0.2 * 0.5) / 6, (2 * second - 0.2) / 6, 0, -2 * third / 6]
    assert gradient(out.logprobs) == pytest.approx(expected, rel=1e-5)
    assert total(metrics, "loss/is_masked_fraction") == sum(w in (0.0, 1.5, 2.0) for w in weights)


def test_the_loss_of_texts_by_hand() -> None:
    out = output()
    share, metrics = TextObjective(0.5, num_tokens=7.0)(out, batch_of(2, 1))
    share.backward()
    # The other four tokens are in other micro-batches.
    assert total(metrics.on_host(), "loss/ptx") / 7 == pytest.approx((1.0 + 2.0 + 0.5) / 7)
    assert metrics.results() == {"loss/ptx": pytest.approx(3.5 / 3)}
    assert share.item() == pytest.approx(0.5 * 3.5 / 7)
    assert gradient(out.logprobs) == pytest.approx([0, -0.5 / 7, -0.5 / 7, 0, -0.5 / 7])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum_norm"])
def test_shares_of_micro_batches_add_up(aggregation: str) -> None:
    settings: dict[str, Any] = {
        "aggregation": aggregation,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "entropy_coef": 0.1,
    }
    whole = replace(five_tokens(), ref_logprobs=REF)
    of_whole, metrics_of_whole = objective(whole, output(), **settings)
    shares, added = 0.0, Metrics()
    for tokens, responses in ((slice(0, 3), (2,)), (slice(3, 5), (1,))):
        assert whole.advantages is not None
        part = replace(
            batch_of(*responses),
            advantages=whole.advantages[tokens],
            ref_logprobs=REF[tokens],
            rollout_logprobs=whole.rollout_logprobs[tokens],
        )
        out = output()
        share, metrics = objective(part, TokenLogprobs(out.logprobs[tokens], out.entropy[tokens]), **settings)
        shares += share.item()
        added += metrics
    assert shares == pytest.approx(of_whole.item())
    assert set(added) == set(metrics_of_whole)
    for key, metric in metrics_of_whole.items():
        assert type(added[key]) is type(metric) and not isinstance(metric, Sum)
        if isinstance(metric, Mean):
            assert total(added, key) == pytest.approx(float(metric.total))
    assert added.results() == pytest.approx(metrics_of_whole.results())


def test_the_value_loss_by_hand() -> None:
    batch = pack_values(
        batch_of(2, 1),
        values=torch.tensor([GARBAGE, 0.0, 0.0, GARBAGE, 0.5]),
        returns=torch.tensor([GARBAGE, 1.0, -1.0, GARBAGE, 0.5]),
    )
    values = torch.tensor([GARBAGE, 0.5, 0.1, GARBAGE, 0.5], requires_grad=True)
    loss = ValueObjective(AlgorithmConfig(), COUNTS, clip=0.2, constant_length=10.0)
    share, metrics = loss(values, batch)
    share.backward()
    # 0.5 left the range: (0.2 - 1)² = 0.64 beats (0.5 - 1)². Then (0.1 + 1)² = 1.21, and 0.
    assert share.item() == pytest.approx((0.64 + 1.21) / 2 / 6)
    assert gradient(values) == pytest.approx([0, 0, 1.1 / 6, 0, 0])
    assert set(metrics) <= set(METRICS)
    assert total(metrics.on_host(), "loss/value_clip_fraction") == 1.0
    # Of the values before the update: residuals 1, -1 and 0 of returns 1, -1 and 0.5, whose mean is 1/6.
    # 1 - (2/3)/(2.25/3 - 1/36) = 1 - 24/26
    assert metrics.results()["loss/explained_variance"] == pytest.approx(1 - 24 / 26)
    unclipped, _ = ValueObjective(AlgorithmConfig(), COUNTS, clip=None, constant_length=10.0)(values, batch)
    assert unclipped.item() == pytest.approx((0.25 + 1.21) / 2 / 6)


def test_counts_of_a_step() -> None:
    tool = pack_samples([make_sample([1, 2, 3], loss_mask=[1, 0, 1]), make_sample([1], loss_mask=[0])])
    batches = [batch_of(2, 1), tool, batch_of(4)]
    assert loss_counts(batches, Ranks()) == LossCounts(tokens=9.0, sequences=4.0)

    class OneOfTwo(Ranks):
        """The other rank has as much."""

        def sum_tensor(self, values: Tensor) -> Tensor:
            return 2 * values

    assert loss_counts(batches, OneOfTwo()) == LossCounts(tokens=18.0, sequences=8.0)


def test_models_are_called_with_the_fields_of_the_batch() -> None:
    batch = five_tokens()

    def call(*arguments: Any, **named: Any) -> Any:
        assert named in (
            {"images": (), "prefixes": None},
            {"routed_experts": None, "images": (), "prefixes": None},
        )
        return arguments

    module: Any = call
    inputs = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
    policy_call, value_call = policy_forward(0.7)(module, batch), value_forward(module, batch)
    assert all(a is b for a, b in zip(policy_call[:4], (*inputs, batch.loss_mask), strict=True))
    assert policy_call[4] == 0.7
    assert all(a is b for a, b in zip(value_call[:3], inputs, strict=True))
