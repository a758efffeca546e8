"""Policy losses: numbers by hand, float64 loops as an independent implementation, garbage, and packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.aggregate import aggregate
from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.algorithms.registry import AGGREGATIONS, POLICY_LOSSES
from rayrlhf.batch import cu_seqlens_of
from tests.algorithms.measured import numbers, policy_loss, totals

NAN, INF = math.nan, math.inf


def run(
    name: str,
    ratios: list[float],
    advantages: list[float],
    lengths: list[int],
    dual_clip: float | None = None,
) -> tuple[list[float], dict[str, float], list[float]]:
    """Loss, metrics (as sums) and gradient of the summed loss, with clip 0.2/0.3, for tokens that have these
    ratios.

    A ratio of NaN makes a token that is not the policy's: masked, with garbage in every field.
    """
    mask = torch.tensor([0.0 if math.isnan(ratio) else 1.0 for ratio in ratios])
    old = torch.full((len(ratios),), -2.0)
    logprobs = (old + torch.tensor(ratios).log()).requires_grad_()
    old[mask == 0] = INF
    advantage = torch.tensor(advantages)
    advantage[mask == 0] = NAN
    loss, metrics = policy_loss(
        name,
        logprobs,
        old,
        advantage,
        mask,
        cu_seqlens_of(lengths),
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    loss.sum().backward()
    assert logprobs.grad is not None
    return loss.tolist(), totals(metrics, float(mask.sum())), logprobs.grad.tolist()


def test_ppo_by_hand() -> None:
    # Two sequences and a padded row in between.
    ratios = [NAN, 1.5, 0.5, 1.5, NAN, NAN, NAN, 0.5, 1.0]
    advantages = [0, 2.0, -1.0, -1.0, 0, 0, 0, 2.0, 3.0]
    loss, metrics, gradient = run("ppo", ratios, advantages, [4, 2, 3])
    #     min(3.0, 1.3·2) = 2.6 clipped | min(-0.5, -0.8) = -0.8 clipped | min(-1.5, -1.3) | min(1, 1.6) | 3
    assert loss == pytest.approx([0, -2.6, 0.8, 1.5, 0, 0, 0, -1.0, -3.0], rel=1e-5)
    # d(-ratio·A)/dlogprob = -ratio·A where the bound does not decide
    assert gradient == pytest.approx([0, 0, 0, 1.5, 0, 0, 0, -1.0, -3.0], rel=1e-5)
    # sums: two clipped; 1.5+0.5+1.5+0.5+1 = 5; ratio - 1 - ln(ratio): 2·(0.5 - ln 1.5) + 2·(-0.5 + ln 2) + 0
    by_hand = {"loss/clip_fraction": 2.0, "loss/ratio": 5.0, "loss/approx_kl": 2 * 0.0945349 + 2 * 0.1931472}
    assert metrics == pytest.approx(by_hand, rel=1e-5)


def test_dual_clip_by_hand() -> None:
    ratios, advantages = [NAN, 10.0, 10.0, 2.0], [0, -1.0, 1.0, -1.0]
    loss, metrics, gradient = run("ppo", ratios, advantages, [4], dual_clip=3.0)
    # max(min(-10, -1.3), -3) = -3: bounded, no gradient | A > 0: min(10, 1.3) | max(-2, -3) = -2: not bounded
    assert loss == pytest.approx([0, 3.0, -1.3, 2.0], rel=1e-5)
    assert gradient == pytest.approx([0, 0, 0, 2.0], rel=1e-5)
    assert metrics["loss/dual_clip_fraction"] == 1.0
    assert metrics["loss/clip_fraction"] == 1.0
    loss, metrics, _ = run("ppo", ratios, advantages, [4])
    assert loss == pytest.approx([0, 10.0, -1.3, 2.0], rel=1e-5)
    assert "loss/dual_clip_fraction" not in metrics


def test_gspo_by_hand() -> None:
    # A: ratios 2 and 8 around a tool token: exp((ln 2 + ln 8)/2) = 4. B: padded row. C: one token, ratio 1.1.
    ratios, advantages = [NAN, 2.0, NAN, 8.0, NAN, NAN, NAN, 1.1], [0, -1.0, 0, -1.0, 0, 0, 0, 2.0]
    loss, metrics, gradient = run("gspo", ratios, advantages, [4, 2, 2])
    # A: -min(-4, -1.3) = 4 on both tokens; C: -min(2.2, 2.2)
    assert loss == pytest.approx([0, 4.0, 0, 4.0, 0, 0, 0, -2.2], rel=1e-5)
    # Each token's loss has the slope -ratio·A in its own logprob: 4; C: -1.1·2
    assert gradient == pytest.approx([0, 4.0, 0, 4.0, 0, 0, 0, -2.2], rel=1e-5)
    assert metrics["loss/ratio"] == pytest.approx(4 + 4 + 1.1)
    assert metrics["loss/clip_fraction"] == 0.0
    # A > 0 in A: min(4, 1.3) is clipped for the whole sequence
    loss, metrics, gradient = run("gspo", ratios, [0, 1.0, 0, 1.0, 0, 0, 0, 2.0], [4, 2, 2])
    assert loss == pytest.approx([0, -1.3, 0, -1.3, 0, 0, 0, -2.2], rel=1e-5)
    assert gradient == pytest.approx([0, 0, 0, 0, 0, 0, 0, -2.2], rel=1e-5)
    assert metrics["loss/clip_fraction"] == 2.0


def test_14_gspo_with_an_advantage_per_token_has_the_gradient_of_gspo_token() -> None:
    """The paper's section 4.3: -s·A/4 per token of a sequence of four. Advantages that come to 0 together
    (rewards with a KL, or GAE) are no reason to learn nothing.
    """
    advantages = [1.0, 1.0, -3.0, 1.0]
    _, metrics, gradient = run("gspo", [1.0] * 4, advantages, [4])
    assert [slope / 4 for slope in gradient] == pytest.approx([-0.25, -0.25, 0.75, -0.25])
    assert metrics["loss/ratio"] == 4.0
    # Off-policy: s = (1·2·2·4)^(1/4) = 2, above the range: good tokens are clipped, the bad one is not.
    loss, metrics, gradient = run("gspo", [1.0, 2.0, 2.0, 4.0], advantages, [4])
    assert loss == pytest.approx([-1.3, -1.3, 6.0, -1.3], rel=1e-5)
    assert gradient == pytest.approx([0.0, 0.0, 6.0, 0.0], rel=1e-5)
    assert metrics["loss/clip_fraction"] == 3.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    drift=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_14_with_one_advantage_per_sequence_it_is_gspo(lengths: list[int], drift: float, seed: int) -> None:
    """Value and gradient of the paper's section 4.1, (1/G) Σ min(s·A, clip(s)·A) with the gradient in s."""
    rng = np.random.default_rng(seed)
    cu_seqlens = cu_seqlens_of(lengths)
    old = torch.tensor(rng.normal(-2, 1, sum(lengths)))
    start = old + torch.tensor(rng.normal(0, drift, sum(lengths)))
    advantages = rng.normal(size=len(lengths))

    new = start.clone().requires_grad_()
    log_ratios = (new - old).split(lengths)
    terms = []
    for log_ratio, advantage in zip(log_ratios, advantages, strict=True):
        s = log_ratio.mean().exp()
        terms.append(torch.minimum(s * advantage, s.clamp(0.8, 1.3) * advantage))
    paper = -torch.stack(terms).mean()
    paper.backward()

    ours = start.float().requires_grad_()
    mask = torch.ones(sum(lengths))
    spread = torch.tensor(np.repeat(advantages, lengths), dtype=torch.float32)
    loss, _ = policy_loss("gspo", ours, old, spread, mask, cu_seqlens, clip_low=0.2, clip_high=0.3)
    counts = {"global_tokens": sum(lengths), "global_sequences": len(lengths), "constant_length": 1.0}
    total = aggregate("sequence_mean", loss, mask, cu_seqlens, **counts)
    total.backward()
    assert total.item() == pytest.approx(paper.item(), rel=1e-4, abs=1e-5)
    assert new.grad is not None
    torch.testing.assert_close(ours.grad, new.grad.float(), rtol=1e-4, atol=1e-5)


def test_cispo_by_hand() -> None:
    ratios, advantages = [NAN, 2.0, 0.5, NAN, NAN, NAN, 1.0], [0, 2.0, -1.0, 0, 0, 0, 3.0]
    loss, metrics, gradient = run("cispo", ratios, advantages, [3, 2, 2])
    # logprobs = -2 + ln ratio = -1.3068528, -2.6931472, -2; weights 1.3 and 0.8 (clipped), 1
    expected = [0, -1.3 * 2 * -1.3068528, -0.8 * -1 * -2.6931472, 0, 0, 0, -1 * 3 * -2.0]
    assert loss == pytest.approx(expected, rel=1e-5)
    # A clipped token still learns: -weight·A
    assert gradient == pytest.approx([0, -2.6, 0.8, 0, 0, 0, -3.0], rel=1e-5)
    assert metrics["loss/clip_fraction"] == 2.0


def test_reinforce_by_hand() -> None:
    ratios, advantages = [NAN, 2.0, 1.0, NAN, NAN, NAN, 1.0], [0, 2.0, -1.0, 0, 0, 0, 3.0]
    loss, metrics, gradient = run("reinforce", ratios, advantages, [3, 2, 2])
    assert loss == pytest.approx(
        [0, 2 * 1.3068528, -2.0, 0, 0, 0, 6.0], rel=1e-5
    )  # -A·logprob, no ratio in it
    assert gradient == [0, -2.0, 1.0, 0, 0, 0, -3.0]
    assert metrics["loss/clip_fraction"] == 0.0
    assert metrics["loss/ratio"] == pytest.approx(4.0)


def test_sapo_by_hand() -> None:
    """τ = 1 for the good tokens: σ(±½) = 0.622459 and 0.377541; τ = 1.05 for the bad one:
    σ(-0.525) = 0.371683.
    Gradients: 4·σ·(1-σ)·ratio·-A.
    """
    loss, metrics, gradient = run("sapo", [NAN, 1.5, 0.5, 0.5], [0, 2.0, 2.0, -1.0], [4])
    assert loss == pytest.approx([0, -8 * 0.622459, -8 * 0.377541, 4 / 1.05 * 0.371683], rel=1e-5)
    assert gradient == pytest.approx(
        [0, -2 * 4 * 0.235004 * 1.5, -2 * 4 * 0.235004 * 0.5, 4 * 0.233535 * 0.5], rel=1e-5
    )
    assert metrics["loss/ratio"] == pytest.approx(2.5)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_every_loss_is_the_policy_gradient(name: str) -> None:
    # At ratio 1 with one advantage per sequence, all have the gradient -A at every token.
    _, metrics, gradient = run(name, [NAN, 1.0, 1.0, NAN, 1.0], [0, 2.0, 2.0, 0, -3.0], [3, 2])
    assert gradient == pytest.approx([0, -2.0, -2.0, 0, 3.0])
    assert metrics == {"loss/approx_kl": 0.0, "loss/clip_fraction": 0.0, "loss/ratio": 3.0}


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_the_log_ratio_is_clamped(name: str) -> None:
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    loss, _ = policy_loss(
        name,
        logprobs,
        torch.tensor([0.0, -26.0]),
        torch.tensor([0.0, -1.0]),
        torch.tensor([0.0, 1.0]),
        cu_seqlens_of([2]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, 4.851652e8], rel=1e-5)  # exp(20), not exp(25)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_empty_mask(name: str) -> None:
    loss, metrics, gradient = run(name, [NAN, NAN, NAN], [0.0, 0.0, 0.0], [2, 1])
    assert loss == gradient == [0.0, 0.0, 0.0]
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_low_precision_is_cast_up(name: str) -> None:
    half = torch.zeros(2, dtype=torch.bfloat16)
    loss, metrics = policy_loss(
        name, half, half, half, torch.ones(2), cu_seqlens_of([2]), clip_low=0.2, clip_high=0.2
    )
    assert {loss.dtype, *(number.dtype for number in numbers(metrics))} == {torch.float32}


def test_errors() -> None:
    one = torch.ones(1)
    for name in ("cispo", "reinforce"):  # that it has no effect there is the config's to say
        entry = POLICY_LOSSES[name]
        assert "dual_clip" not in entry.reads
        with pytest.raises(TypeError, match="dual_clip"):
            clips = dict.fromkeys(entry.reads, 0.2)
            entry.function(one, one, one, one, cu_seqlens_of([1]), **clips, dual_clip=3.0)
    for name in ("ppo", "gspo"):
        with pytest.raises(ValueError, match=r"dual_clip=1\.0 must be > 1"):
            run(name, [1.0], [1.0], [1], dual_clip=1.0)


def reference_sequence(
    name: str, logprobs: np.ndarray, old: np.ndarray, advantages: np.ndarray, dual_clip: float | None
) -> tuple[list[float], list[float], dict[str, float]]:
    """Losses, gradients of their sum and metric sums of one sequence's policy tokens (clip 0.2/0.3)."""
    n = len(logprobs)
    log_ratios = logprobs - old
    per_token = [math.exp(min(20.0, max(-20.0, x))) for x in log_ratios]
    ratios = (
        [math.exp(min(20.0, max(-20.0, float(np.mean(log_ratios)))))] * n if name == "gspo" else per_token
    )
    losses, slopes = [], []  # slopes: d loss_i / d log of the ratio_i (ppo, gspo) or logprob_i
    sums = {"loss/clip_fraction": 0.0, "loss/ratio": sum(ratios), "loss/approx_kl": 0.0}
    bounded = 0.0
    for logprob, log_ratio, ratio, advantage in zip(logprobs, log_ratios, ratios, advantages, strict=True):
        sums["loss/approx_kl"] += math.exp(min(10.0, max(-10.0, log_ratio))) - 1 - log_ratio
        near = min(1.3, max(0.8, ratio))
        if name == "reinforce":
            losses.append(-advantage * logprob)
            slopes.append(-advantage)
        elif name == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            losses.append(-4 / tau * gate * advantage)
            slopes.append(-4 * gate * (1 - gate) * ratio * advantage)
        elif name == "cispo":
            losses.append(-near * advantage * logprob)
            slopes.append(-near * advantage)
            sums["loss/clip_fraction"] += near != ratio
        else:
            clipped = near * advantage < ratio * advantage
            sums["loss/clip_fraction"] += clipped
            term = near * advantage if clipped else ratio * advantage
            floor = dual_clip is not None and advantage < 0 and dual_clip * advantage > term
            bounded += floor
            losses.append(-dual_clip * advantage if floor and dual_clip is not None else -term)
            slopes.append(0.0 if clipped or floor else -term)
    if dual_clip is not None:
        sums["loss/dual_clip_fraction"] = bounded
    return losses, slopes, sums


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(POLICY_LOSSES)),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    drift=st.sampled_from([0.1, 0.5, 3.0]),
    dual_clip=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_losses_match_float64_loops(
    name: str, lengths: list[int], drift: float, dual_clip: float | None, seed: int
) -> None:
    dual_clip = dual_clip if name in ("ppo", "gspo") else None
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mask = rng.random(total) < rng.choice([0.0, 0.6, 1.0])
    old = rng.normal(-2, 1, total).astype(np.float32)
    logprobs = (old + rng.normal(0, drift, total)).astype(np.float32)
    advantages = rng.normal(size=total).astype(np.float32)

    losses, gradients, sums = np.zeros(total), np.zeros(total), dict[str, float]()
    for start, stop in zip(np.cumsum([0, *lengths[:-1]]), np.cumsum(lengths), strict=True):
        policy = [t for t in range(start, stop) if mask[t]]
        if policy:
            x, y, a = (column[policy].astype(np.float64) for column in (logprobs, old, advantages))
            losses[policy], gradients[policy], part = reference_sequence(name, x, y, a, dual_clip)
            sums = {key: sums.get(key, 0.0) + value for key, value in part.items()}

    garbage = rng.choice([NAN, INF, -INF])
    leaf, t_old, t_advantages = (
        torch.tensor(np.where(mask, x, np.float32(garbage))) for x in (logprobs, old, advantages)
    )
    leaf.requires_grad_()
    loss, metrics = policy_loss(
        name,
        leaf,
        t_old,
        t_advantages,
        torch.tensor(mask).float(),
        cu_seqlens_of(lengths),
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), losses, atol=1e-5, rtol=1e-5)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, gradients, atol=1e-5, rtol=1e-5)
    for key, value in totals(metrics, float(mask.sum())).items():
        assert value == pytest.approx(sums.get(key, 0.0), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=7),
    num_micro_batches=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_packing_gives_the_same_objective_and_gradients(
    name: str, aggregation: str, lengths: list[int], num_micro_batches: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = [torch.tensor(rng.random(n) < rng.choice([0.0, 0.7, 1.0])).float() for n in lengths]
    old = [torch.tensor(rng.normal(-2, 1, n), dtype=torch.float32) for n in lengths]
    new = [x + torch.tensor(rng.normal(0, 0.4, x.numel()), dtype=torch.float32) for x in old]
    advantages = [torch.tensor(rng.normal(size=n), dtype=torch.float32) for n in lengths]
    tokens = sum(mask.sum().item() for mask in masks)
    sequences = float(sum(bool(mask.any()) for mask in masks))

    def objective(parts: list[list[int]]) -> tuple[float, dict[str, float], list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in new]
        total, measured = 0.0, Metrics()
        for part in filter(None, parts):
            mask, cu_seqlens = torch.cat([masks[i] for i in part]), cu_seqlens_of([lengths[i] for i in part])
            columns = (torch.cat([column[i] for i in part]) for column in (leaves, old, advantages))
            loss, metrics = policy_loss(name, *columns, mask, cu_seqlens, clip_low=0.2, clip_high=0.3)
            piece = aggregate(
                aggregation,
                loss,
                mask,
                cu_seqlens,
                global_tokens=tokens,
                global_sequences=sequences,
                constant_length=10.0,
            )
            piece.backward()
            total += piece.item()
            measured += metrics
        return total, totals(measured, tokens), [leaf.grad for leaf in leaves if leaf.grad is not None]

    cuts = np.array_split(rng.permutation(len(lengths)), num_micro_batches)
    whole, whole_sums, whole_gradients = objective([list(range(len(lengths)))])
    split, split_sums, split_gradients = objective([cut.tolist() for cut in cuts])
    assert split == pytest.approx(whole, abs=1e-5)
    assert split_sums == pytest.approx(whole_sums, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(split_gradients, whole_gradients, atol=1e-6, rtol=1e-5)
    assert len(whole_gradients) == len(lengths)
