"""Two ranks under DeepSpeed equal one process of plain torch AdamW, in every combination that a CPU can run.

Neither the packing nor handing the device to engines between steps makes a difference.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, cu_seqlens_of, padding_samples, position_ids_of
from rayrlhf.config.model import LoraConfig, TrainedModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.adapters import weights_of
from rayrlhf.models.load import adapt, checkpoint_activations, load_policy
from rayrlhf.models.logprobs import PolicyModel

WORLD_SIZE = 2
# A secondary partition (hpZ) lives in NCCL groups of a node, and is not here.
VARIANTS: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 0, "gradient_checkpointing": True},
    *[
        {"zero_stage": stage, "overlap_comm": overlap, "offload_optimizer": offload}
        for stage in (1, 2, 3)
        for overlap in (False, True)[:stage]
        for offload in (False, True)
    ],
    {"zero_stage": 3, "offload_params": True},
    {"zero_stage": 3, "offload_params": True, "offload_optimizer": True, "gradient_checkpointing": True},
]
# With adapters on a frozen model.
ADAPTED: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 1, "gradient_checkpointing": True},
    {"zero_stage": 2, "offload_optimizer": True},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload_params": True, "gradient_checkpointing": True},
]
# And with that in 4 bits.
QUANTIZED: list[dict[str, Any]] = [
    {"zero_stage": 0, "gradient_checkpointing": True},
    {"zero_stage": 2},
    {"zero_stage": 3},
]
# And with sequences that both ranks share.
SHARED: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 2, "gradient_checkpointing": True},
    {"zero_stage": 3, "offload_params": True},
]
# And with compiled layers.
COMPILED: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 1, "gradient_checkpointing": True},
    {"zero_stage": 2, "overlap_comm": True, "offload_optimizer": True},
]
LORA = LoraConfig(rank=4, alpha=8)
MODELS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adapters": {"lora": LORA},
    "adapters on 4 bits": {"lora": LORA, "quantization": "nf4"},
    "shared": {"sequence_parallel": WORLD_SIZE},
    "compiled": {"compile": True},
}
NUM_STEPS = 5
LR = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 0.5

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def sequences(step: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, loss mask) of one rank's sequences; ranks have unequal tokens, rank 1 none at all in
    step 2.
    """
    generator = torch.Generator().manual_seed(100 * step + rank)
    lengths = torch.randint(5, 20, (3 + rank,), generator=generator).tolist()
    result = []
    for length in lengths:
        mask = torch.ones(length)
        mask[: length // 3 + 1] = 0
        if step == 2 and rank == 1:
            mask[:] = 0
        result.append((torch.randint(8, 264, (length,), generator=generator), mask))
    return result


def packed(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> PackedBatch:
    lengths = [ids.numel() for ids, _ in parts]
    return PackedBatch(
        input_ids=torch.cat([ids for ids, _ in parts]),
        position_ids=position_ids_of(lengths),
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=torch.cat([mask for _, mask in parts]),
    )


def forward(module: Any, batch: PackedBatch) -> torch.Tensor:
    return module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask).logprobs


def global_tokens(step: int) -> float:
    return float(sum(mask.sum() for rank in range(WORLD_SIZE) for _, mask in sequences(step, rank)))


def load(model_path: str, kind: str, chunk_tokens: int, train: TrainConfig | None = None) -> PolicyModel:
    """`kind` of `MODELS`, as `train` would have it; without it, nothing is compiled."""
    from rayrlhf.train.deepspeed_engine import loading

    settings = {key: value for key, value in MODELS[kind].items() if train is not None or key != "compile"}
    model = TrainedModelConfig(path=model_path, **settings)
    cpu = torch.device("cpu")
    with loading(train, torch.float32, in_parts=model.loads_in_parts) if train is not None else nullcontext():
        policy = load_policy(model, model_path, device=cpu, chunk_tokens=chunk_tokens)
    adapt(model, policy.causal_lm, device=cpu, seed=1)
    return policy


def merged(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {w.name: w.merged() for w in weights_of(policy.causal_lm, remove_duplicate=False)}


def plain_adamw(model_path: str, kind: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, no packing: every sequence by itself."""
    model = load(model_path, kind, chunk_tokens=10_000)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
    )
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for rank in range(WORLD_SIZE):
            for part in sequences(step, rank):
                total = total - forward(model, packed([part])).sum() / global_tokens(step)
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, norms, merged(model)


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On each of two workers: the same steps through the learner, in three micro-batches, one of padding."""
    from rayrlhf.train import collectives
    from rayrlhf.train.learner import Learner, Term
    from rayrlhf.train.offload import offload_states, reload_states
    from rayrlhf.train.reference import AdaptersOff
    from rayrlhf.train.sequence_parallel import set_sequence_group

    torch.set_num_threads(1)
    results = []
    for variant, kind in arguments["variants"]:
        config = TrainConfig(
            num_steps=NUM_STEPS,
            num_workers=WORLD_SIZE,
            **variant,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        )
        policy = load(arguments["model"], kind, chunk_tokens=7, train=config)
        has_adapters = "lora" in MODELS[kind]
        loaded = sum(p.numel() for p in policy.parameters() if not has_adapters or not p.requires_grad)
        in_4_bits = "quantization" in MODELS[kind]
        in_parts = config.zero_stage == 3 and not in_4_bits
        assert (loaded == 0) == in_parts, "under ZeRO-3 no rank holds a whole tensor"
        if config.gradient_checkpointing:
            checkpoint_activations(policy.causal_lm)
        set_sequence_group(policy, TrainedModelConfig(path=arguments["model"], **MODELS[kind]), config)
        learner = Learner(policy, config, lr=LR, dtype=torch.float32, name="actor")
        before = AdaptersOff(learner).logprobs([packed(sequences(0, 0))], 1.0)
        losses, norms, batches = [], [], []
        for step in range(NUM_STEPS):
            parts = sequences(step, collectives.rank())
            batches = [packed(parts[:2]), packed(parts[2:]), padding_samples(token_id=0)]
            tokens = global_tokens(step)
            term = Term(batches, forward, lambda logprobs, _, n=tokens: (-logprobs.sum() / n, Metrics()))
            metrics = learner.update(term, step=step).results()
            losses.append(metrics["loss/actor"])
            norms.append(metrics["loss/actor_grad_norm"])
            if step == 2:  # engines take their turn
                offload_states(learner.engine)
                offload_states(learner.engine)
                if config.zero_stage < 3 and not in_4_bits:
                    weights_now = learner.state_dict(learner.module.causal_lm, on_this_rank=True)
                    assert learner.weight_offload.to_host() > 0
                    on_host = learner.state_dict(learner.module.causal_lm, on_this_rank=True)
                    assert all(torch.equal(on_host[name], each) for name, each in weights_now.items())
            if step == 2 or step == 3:  # the second time there is nothing to bring back
                learner.weight_offload.to_device()
                reload_states(learner.engine)
        weights = learner.state_dict(learner.module.causal_lm, on_this_rank=collectives.rank() == 0)
        # Without its adapters it is still the model that it was.
        off = AdaptersOff(learner).logprobs([packed(sequences(0, 0))], 1.0)
        assert torch.equal(off[0], before[0]) == has_adapters
        # A gradient that is not finite must leave the weights alone and be counted.
        bad_term = Term(batches, forward, lambda logprobs, _: (logprobs.sum() * float("nan"), Metrics()))
        bad = learner.update(bad_term, step=4).results()
        after = learner.state_dict(learner.module.causal_lm, on_this_rank=collectives.rank() == 0)
        unchanged = all(torch.equal(weights[name], after[name]) for name in weights)
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        results.append((losses, norms, arrays, bad["loss/actor_bad_steps"], unchanged))
        learner.engine.destroy()
    return {"results": results if collectives.rank() == 0 else []}


def test_two_ranks_equal_plain_adamw(tmp_path: Path, tiny_model: str) -> None:
    """Of a whole model and of adapters, which a frozen one has."""
    each = zip((VARIANTS, ADAPTED, QUANTIZED, SHARED, COMPILED), MODELS, strict=True)
    variants = [(variant, kind) for of_kind, kind in each for variant in of_kind]
    result = TorchTrainer(
        train,
        train_loop_config={"model": tiny_model, "variants": variants},
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="parity", storage_path=str(tmp_path)),
    ).fit()
    assert result.return_value is not None
    start = {kind: merged(load(tiny_model, kind, chunk_tokens=10_000)) for kind in MODELS}
    expected = {kind: plain_adamw(tiny_model, kind) for kind in MODELS}
    for (variant, kind), got in zip(variants, result.return_value["results"], strict=True):
        losses, norms, weights = expected[kind]
        case = f"{variant}, {kind}"
        got_losses, got_norms, got_weights, bad_steps, unchanged = got
        assert got_losses == pytest.approx(losses, abs=1e-5), case
        assert got_norms == pytest.approx(norms, rel=1e-5), case
        assert got_weights.keys() == weights.keys()
        for name, wanted in weights.items():
            distance = (torch.from_numpy(got_weights[name].copy()) - wanted).norm()
            assert distance < 1e-5 * wanted.norm(), f"{case} {name}: relative distance {distance:.1e}"
            if "lora" in MODELS[kind]:  # of the adapter's update, a small part of the weight
                assert distance <= 1e-3 * (wanted - start[kind][name]).norm(), (
                    f"{case} {name}: {distance:.1e}"
                )
        assert bad_steps == 1 and unchanged, f"{case} must skip a step with a NaN gradient"
