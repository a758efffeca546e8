"""Mixtures of experts on two ranks under DeepSpeed equal one process of plain torch AdamW.

The objective has the balance loss of transformers over all sequences of the step. Rank 1 has no loss token in
one of the steps, and padding batches use few of the experts: no rank may wait for another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import padding_samples
from rayrlhf.config.model import LoraConfig, TrainedModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.adapters import weights_of
from rayrlhf.models.load import adapt, checkpoint_activations, load_policy
from tests.integration.test_zero_parity import (
    LR,
    MAX_GRAD_NORM,
    NUM_STEPS,
    WEIGHT_DECAY,
    WORLD_SIZE,
    forward,
    global_tokens,
    packed,
    sequences,
)
from tests.tiny_families import make_family

COEF = 0.2
LORA = LoraConfig(rank=4, alpha=8, experts=True)
SHARED = {"sequence_parallel": WORLD_SIZE}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # family, train, model
    ("mixtral", {"zero_stage": 0}, {}),
    ("mixtral", {"zero_stage": 2, "gradient_checkpointing": True}, {}),
    ("mixtral", {"zero_stage": 3}, {}),
    ("mixtral", {"zero_stage": 3, "gradient_checkpointing": True}, SHARED),
    ("qwen3_moe", {"zero_stage": 2}, {}),
    ("qwen3_moe", {"zero_stage": 3, "offload_params": True}, {}),
    ("deepseek_v3", {"zero_stage": 3, "gradient_checkpointing": True}, {}),
    ("mixtral", {"zero_stage": 2}, {"lora": LORA}),
    ("mixtral", {"zero_stage": 3, "gradient_checkpointing": True}, {"lora": LORA}),
]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def balance_loss(policy: Any, step: int) -> Tensor:
    """transformers' own, and for DeepSeek, which has none, the same of sigmoid scores that sum to 1."""
    layers: list[list[Tensor]] = []
    model = policy.causal_lm
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    logits: list[list[Any]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _m, _i, out, of=of: of.append(out))
        for router, of in zip(routers, logits, strict=True)
    ]
    for rank in range(WORLD_SIZE):
        for part in sequences(step, rank):
            forward(policy, packed([part]))
    for hook in hooks:
        hook.remove()
    layers = [torch.cat([out[0] for out in of]) for of in logits]  # pyright: ignore[reportAssignmentType]
    every: Any = tuple(layers)
    experts, chosen = every[0].size(-1), model.config.num_experts_per_tok
    if model.config.model_type != "deepseek_v3":
        loss: Any = load_balancing_loss_func(every, experts, chosen)
        return loss
    scores = torch.cat(list(every)).sigmoid()
    sent = torch.nn.functional.one_hot(torch.cat([out[2] for of in logits for out in of]), experts)
    probabilities = scores / scores.sum(-1, keepdim=True)
    return experts * (sent.sum(1).float().mean(0) * probabilities.mean(0)).sum()


def plain_adamw(folder: str, changes: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    cpu, config = torch.device("cpu"), TrainedModelConfig(path=folder, dtype="float32", **changes)
    policy = load_policy(config, folder, device=cpu, chunk_tokens=10_000)
    adapt(config, policy.causal_lm, device=cpu, seed=1)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
    )
    losses, balances = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        balance = balance_loss(policy, step)
        total = COEF * balance
        for rank in range(WORLD_SIZE):
            for part in sequences(step, rank):
                total = total - forward(policy, packed([part])).sum() / global_tokens(step)
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(total.item())
        balances.append(balance.item())
    return losses, balances, {w.name: w.merged() for w in weights_of(policy.causal_lm)}


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    from rayrlhf.train import collectives
    from rayrlhf.train.deepspeed_engine import loading
    from rayrlhf.train.learner import Learner, Term
    from rayrlhf.train.sequence_parallel import set_sequence_group

    torch.set_num_threads(1)
    results = []
    for family, variant, changes in arguments["variants"]:
        folder = arguments["folders"][family]
        config = TrainConfig(
            num_steps=NUM_STEPS,
            num_workers=WORLD_SIZE,
            **variant,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        )
        model = TrainedModelConfig(path=folder, aux_loss_coef=COEF, **changes)
        with loading(config, torch.float32):
            policy = load_policy(model, folder, device=torch.device("cpu"), chunk_tokens=7)
        adapt(model, policy.causal_lm, device=torch.device("cpu"), seed=1)
        if config.gradient_checkpointing:
            checkpoint_activations(policy.causal_lm)
        set_sequence_group(policy, model, config)
        learner = Learner(policy, config, lr=LR, dtype=torch.float32, name="actor", aux_loss_coef=COEF)
        losses, balances = [], []
        for step in range(NUM_STEPS):
            parts = sequences(step, collectives.rank())
            if (
                step == 3 and model.sequence_parallel == 1
            ):  # one micro-batch: the load is reduced between its two passes
                batches = [packed(parts)]
            else:
                batches = [packed(parts[:2]), packed(parts[2:]), padding_samples(token_id=0)]
            tokens = global_tokens(step)
            term = Term(batches, forward, lambda logprobs, _, n=tokens: (-logprobs.sum() / n, Metrics()))
            metrics = learner.update(term, step=step).results()
            assert metrics["experts/actor_load_max"] >= 1.0
            losses.append(metrics["loss/actor"])
            balances.append(metrics["loss/actor_balance"])
        weights = learner.state_dict(learner.module.causal_lm, on_this_rank=collectives.rank() == 0)
        results.append((losses, balances, {name: tensor.numpy() for name, tensor in weights.items()}))
        learner.engine.destroy()
    return {"results": results if collectives.rank() == 0 else []}


def test_two_ranks_with_experts_equal_plain_adamw(tmp_path: Path) -> None:
    families = sorted({family for family, _, _ in VARIANTS})
    folders = {family: make_family(tmp_path / family, family) for family in families}
    result = TorchTrainer(
        train,
        train_loop_config={"folders": folders, "variants": VARIANTS},
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="expert_parity", storage_path=str(tmp_path)),
    ).fit()
    assert result.return_value is not None
    expected = {
        (family, has_adapters): plain_adamw(folders[family], {"lora": LORA} if has_adapters else {})
        for family, has_adapters in {(family, "lora" in model) for family, _, model in VARIANTS}
    }
    for variant, got in zip(VARIANTS, result.return_value["results"], strict=True):
        losses, balances, weights = expected[variant[0], "lora" in variant[2]]
        got_losses, got_balances, got_weights = got
        assert got_losses == pytest.approx(losses, abs=1e-5), variant
        assert got_balances == pytest.approx(balances, abs=1e-5), variant
        for name, wanted in weights.items():
            distance = (torch.from_numpy(got_weights[name].copy()) - wanted).norm()
            assert distance < 1e-5 * wanted.norm(), f"{variant} {name}: relative distance {distance:.1e}"
