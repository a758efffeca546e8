"""Bytes of roles, worked out by hand for a shape of round numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rayrlhf.capacity import memory
from rayrlhf.capacity.activations import Activations, Adapter, Precision, activations, layer_activation_bytes
from rayrlhf.capacity.model_shape import ModelShape
from rayrlhf.capacity.vision_tower import VisionTower
from rayrlhf.config.train import TrainConfig

BF16 = Precision(2, on_gpu=True)
FP32 = Precision(4, on_gpu=False)
# Projections of a layer: attention 100 x (2 x 100 + 2 x 50) = 30,000, MLP 3 x 100 x 200 = 60,000; norms 200.
# Ten layers 902,000, embedding 100,000, last norm 100: 1,002,100, and another 100,000 for the head.
SHAPE = ModelShape(
    name="round",
    hidden=100,
    layers=10,
    heads=10,
    kv_heads=5,
    head_dim=10,
    intermediate=200,
    vocabulary=1000,
    tied=False,
)
COUNT = 1_102_100


def config(**changes: Any) -> TrainConfig:
    values = {"num_steps": 1, "num_workers": 4, "zero_stage": 0, "max_tokens_per_micro_batch": 1000}
    return TrainConfig.model_validate(values | changes)


def trainer(train: TrainConfig, precision: Precision = BF16, **more: Any) -> memory.Bytes:
    return memory.trainer(SHAPE, train, precision, num_workers=train.num_workers, name="actor", **more)


def test_the_shape() -> None:
    assert SHAPE.parameters == COUNT and SHAPE.scorer_parameters == 1_002_200


@pytest.mark.parametrize(
    "stage, weights, gradients, optimizer",
    [
        (0, 2 * COUNT, 2 * COUNT, 12 * COUNT),
        (1, 2 * COUNT, 2 * COUNT, 3 * COUNT),
        (2, 2 * COUNT, COUNT // 2, 3 * COUNT),
        (3, COUNT // 2, COUNT // 2, 3 * COUNT),
    ],
)
def test_four_workers_partition_states(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    """2 bytes of weights and gradients, 4 of fp32 weights and 8 of moments per parameter."""
    held = trainer(config(zero_stage=stage)).device
    assert (held["weights"], held["gradients"], held["optimizer"]) == (weights, gradients, optimizer)
    if stage >= 2:
        wide = trainer(config(zero_stage=stage, grad_accum_dtype="float32")).device
        assert wide["gradients"] == 2 * gradients


def test_fp32_without_zero_has_no_second_copy() -> None:
    assert trainer(config(), FP32).device["optimizer"] == 8 * COUNT
    assert trainer(config(zero_stage=2), FP32).device["optimizer"] == 12 * COUNT // 4


def test_offloading_moves_bytes_to_the_host() -> None:
    held = trainer(config(zero_stage=3, offload_optimizer=True))
    assert "optimizer" not in held.device and "gradients" not in held.device
    # Gradients add up in bf16 and become fp32 for the step.
    assert held.host["optimizer"] == 3 * COUNT + COUNT // 2 + COUNT
    held = trainer(config(zero_stage=3, offload_optimizer=True, grad_accum_dtype="float32"))
    assert held.host["optimizer"] == 3 * COUNT + 2 * COUNT
    held = trainer(config(zero_stage=3, offload_params=True))
    assert "weights" not in held.device and held.host["weights"] == COUNT // 2


def test_activations_by_hand() -> None:
    # bf16 on a GPU, per token of a layer: norms 2 x (4 + 4) x 100 + 8, attention (2 x 100 + 2 x 50) x 2 + 40,
    # MLP 4 x 200 x 2.
    assert layer_activation_bytes(SHAPE, BF16) == 1608 + 640 + 1600
    # fp32 on a CPU: 2 x 12 x 100 + 8, (3 x 100 + 2 x 50) x 4 + 40, 4 x 200 x 4.
    assert layer_activation_bytes(SHAPE, FP32) == 2408 + 1640 + 3200
    # Outside the layers: last norm 8 x 100, the hidden state 2 x 100, cosines and sines 2 x 2 x 10.
    kept = activations(SHAPE, BF16, checkpointing=False)
    assert kept.at_the_head(1000) == 1000 * (1040 + 10 * 3848)
    kept = activations(SHAPE, BF16, checkpointing=True)
    assert kept.at_the_head(1000) == 1000 * (1040 + 10 * 200)
    # One layer again, with gradients of two of the MLP's 200 numbers; the last norm has gone.
    in_layer = 1000 * (40 + 10 * 200 + 3848 + 800)
    assert kept.in_the_last_layer(1000) == in_layer
    gathered = 1000 * 2 * 50 * 2  # the keys and values of the recomputed layer
    assert kept.in_the_last_layer(1000, ranks=4) == gathered + (in_layer - gathered) // 4
    assert kept.at_the_head(1000, ranks=4) == 1000 * (1040 + 10 * 200) // 4


def test_offloaded_activations_are_on_the_host() -> None:
    """All layers' inputs but the last one's; the device holds two of ten, of 1000 tokens x 200 B."""
    kept = activations(SHAPE, BF16, checkpointing=True, offload=True)
    assert kept.at_the_head(1000) == 1000 * (1040 + 2 * 200)
    assert kept.in_the_last_layer(1000) == 1000 * (40 + 2 * 200 + 3848 + 800)
    settings = {"gradient_checkpointing": True, "max_tokens_per_micro_batch": 1000}
    own, offloaded = (trainer(config(**settings, activation_offload=each)) for each in (False, True))
    assert own.device["activations"] - offloaded.device["activations"] == 1000 * 8 * 200
    assert own.host == {} and offloaded.host == {"offloaded activations": 9 * 2**18}  # 200,000, rounded
    one = ModelShape(**{**vars(SHAPE), "layers": 1})
    assert activations(one, BF16, checkpointing=True, offload=True).offloaded == 0


def test_the_heads_temporaries_use_the_memory_of_the_recomputed_layer() -> None:
    # A chunk of 256 x 1000 fp32 logits, 1000 x 100 bf16 gradients of the input, 4 x 100,000 of the weight.
    assert memory.head_bytes(SHAPE, 256, BF16, 1000) == (1_024_000 + 200_000 + 400_000, 0)
    tied = ModelShape(**{**vars(SHAPE), "tied": True})
    assert memory.head_bytes(tied, 256, BF16, 1000) == (1_024_000 + 200_000, 400_000)
    assert trainer(config()).device["logits"] == 1_624_000
    checkpointing = {"gradient_checkpointing": True, "logprob_chunk_tokens": 256}
    assert "logits" not in trainer(config(**checkpointing)).device  # a layer: 4,648,000
    few = trainer(config(**checkpointing, max_tokens_per_micro_batch=100)).device
    assert few["logits"] == 1_444_000 + 100 * 1000 - 100 * 4648


def test_the_end_of_the_backward_pass_and_the_step_may_need_more() -> None:
    one_token = {"num_workers": 1, "max_tokens_per_micro_batch": 1, "logprob_chunk_tokens": 1}

    def in_addition_to_states(**changes: Any) -> int:
        return trainer(config(**one_token, **changes)).only("activations", "logits", "buffers").total

    # ZeRO flattens bf16 gradients, then widens them to fp32; 1 and 2 have freed their buffer by then.
    assert in_addition_to_states(zero_stage=1) == (2 + 4) * COUNT
    assert in_addition_to_states(zero_stage=2) == (2 + 4) * COUNT
    buffer = 2 * COUNT
    live = 2 * SHAPE.layer_parameters * 2
    assert in_addition_to_states(zero_stage=3) == (2 + 4) * COUNT + buffer + live
    # Gradients accumulated in fp32 are wide already, and flat under ZeRO-2.
    wide = {"grad_accum_dtype": "float32"}
    assert trainer(config(**one_token, zero_stage=2, **wide)).device["buffers"] == buffer
    assert in_addition_to_states(zero_stage=3, **wide) == 4 * COUNT + buffer + live
    # Nothing to widen: the buffer, and gradients that are added to others.
    assert in_addition_to_states(zero_stage=2, master_weights="bfloat16") == buffer + 2 * COUNT


def test_adapters_train_alone() -> None:
    # Rank 8: q and o 8 x 200 each, k and v 8 x 150, gate, up and down 8 x 300, in ten layers.
    adapter = Adapter(8)
    assert adapter.parameters(SHAPE) == 80 * (2 * 200 + 2 * 150 + 3 * 300) == 128_000
    assert Adapter(8, ("q_proj", "v_proj")).parameters(SHAPE) == 80 * (200 + 150)
    experts = ModelShape(**{**vars(SHAPE), "experts": 8, "experts_per_token": 2})
    assert adapter.parameters(experts) == 80 * (2 * 200 + 2 * 150)
    held = trainer(config(), adapter=adapter).device
    assert held["gradients"] == 2 * 128_000 and held["optimizer"] == 12 * 128_000
    assert held["weights"] == 2 * (COUNT + 128_000)
    quantized = trainer(config(), adapter=Adapter(8, quantized=True)).device["weights"]
    assert quantized == round(900_000 * 4.127 / 8 + 202_100 * 2) + 2 * 128_000


@pytest.mark.parametrize("adapter", [None, Adapter(8), Adapter(8, quantized=True)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_stage": 1, "gradient_checkpointing": True},
        {"zero_stage": 2, "gradient_checkpointing": True, "activation_offload": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "master_weights": "bfloat16"},
        {"zero_stage": 3, "offload_optimizer": True, "offload_params": True},
    ],
)
def test_the_arithmetic_gives_the_reported_bytes(adapter: Adapter | None, changes: dict[str, Any]) -> None:
    held = trainer(config(**changes), adapter=adapter, sequence_parallel=2)
    for line in held.working:
        kind, _, terms = line.removeprefix("actor ").partition(": ")
        reported = (held.host if "in host memory" in line else held.device)[kind]
        assert _worked_out(terms) == pytest.approx(reported, rel=0.002), line


def _worked_out(terms: str) -> float:
    """The value of "1.1e6 x 12 B (two moments, fp32 weights) / 4 (ZeRO-3 over 4), in host memory"."""
    formula = re.sub(r"\((two|ZeRO|ranks|pinned)[^)]*\)|, in host memory", "", terms).replace(" x ", " * ")
    formula = re.sub(r"(?<=\d),(?=\d)", "", formula).replace("bits", "/ 8")
    return float(eval(re.sub(r"[a-zA-Z]{2,}|\bB\b", "", formula)))


MOE = ModelShape(**{**vars(SHAPE), "experts": 8, "experts_per_token": 2})


def test_experts_hold_all_and_use_some() -> None:
    assert MOE.mlp_matrices == 8 * 60_000
    dense, sparse = layer_activation_bytes(SHAPE, BF16), layer_activation_bytes(MOE, BF16)
    # Twice: sorted inputs, outputs and four of the inner size, in bf16. Three permutations of int64 and a
    # sorted weight; eight probabilities in fp32, and the two chosen ones in fp32 with an int64 index.
    experts = 2 * (2 * 100 + 4 * 200) * 2 + 2 * (3 * 8 + 2) + 8 * 4 + 2 * (8 + 4)
    assert sparse - dense == experts - 4 * 200 * 2
    # Frozen ones need neither inputs nor products; adapters of them need both, and what is between A and B.
    plain, adapted = Adapter(8), Adapter(8, experts=True)
    frozen = layer_activation_bytes(MOE, BF16, plain)
    own = layer_activation_bytes(MOE, BF16, adapted)
    assert own - frozen == 2 * (100 + 200 + 2 * 8) * 2
    # Of each expert A is 8 x (100 + 200), B 8 x (400 + 100).
    assert adapted.parameters(MOE) - plain.parameters(MOE) == 10 * 8 * 8 * (100 + 400 + 200 + 100)


def test_routers_are_recorded_outside_of_checkpointed_layers() -> None:
    kept = activations(MOE, BF16, checkpointing=True)
    # Ten layers with eight bf16 logits, two indices and two weights; the dense model's rest.
    recorded = 10 * (8 * 2 + 2 * (8 + 2))
    assert kept.at_the_head(1000) == 1000 * (1040 + 10 * 200 + recorded)
    balanced = activations(MOE, BF16, checkpointing=True, has_balance_loss=True)
    assert balanced.in_the_last_layer(1000) - kept.in_the_last_layer(1000) == 1000 * 10 * 8 * 2


def test_some_layers_have_no_experts() -> None:
    mixed = ModelShape(**{**vars(MOE), "dense_layers": 3, "dense_intermediate": 150})
    of_layer = 8 * 60_000 + 8 * 100
    assert MOE.parameters - mixed.parameters == 3 * (of_layer - 3 * 100 * 150)
    layer = layer_activation_bytes(MOE, BF16)
    dense = layer_activation_bytes(ModelShape(**{**vars(SHAPE), "intermediate": 150}), BF16)
    # Last norm and hidden state 1,000, cosines 40, routers of seven layers.
    held = 1040 + 7 * layer + 3 * dense + 7 * (8 * 2 + 2 * 10)
    assert activations(mixed, BF16, checkpointing=False).at_the_head(1000) == 1000 * held


def test_towers_are_trained_or_run_before_the_language_model() -> None:
    tower = VisionTower(
        hidden=10, depth=3, heads=2, intermediate=20, merge=2, patch_values=12, out_hidden=100
    )
    seeing = ModelShape(**{**vars(SHAPE), "vision": tower})
    # Per patch of a block: norms 2 x (8 x 10 + 4), fused projection 30, rotated 20, output 10 and MLP 80 in
    # bf16, log-sum-exp 8. Around them 12 values in fp32 and bf16, a norm 8 x 10, twice 10 around GELU.
    block, ends = 2 * 84 + 140 * 2 + 8, 12 * 6 + 80 + 40
    plain, kept = (
        activations(shape, BF16, checkpointing=False, image_tokens=50) for shape in (SHAPE, seeing)
    )
    assert kept.at_the_head(1000) - plain.at_the_head(1000) == 200 * (3 * block + ends)
    kept = activations(seeing, BF16, checkpointing=True, image_tokens=50)
    assert kept.in_the_tower == 200 * (3 * 20 + ends + block)
    frozen = activations(seeing, BF16, checkpointing=True, image_tokens=50, freeze_vision=True)
    assert frozen.at_the_head(1000) == plain_with_checkpointing().at_the_head(1000)
    held = trainer(config(), freeze_vision=True).device["gradients"]
    assert held == 2 * COUNT  # without a tower
    train = config()
    seen = memory.trainer(seeing, train, BF16, num_workers=4, name="actor", freeze_vision=True).device
    assert seen["gradients"] == 2 * COUNT and seen["weights"] == 2 * (COUNT + tower.parameters)


def plain_with_checkpointing() -> Activations:
    return activations(SHAPE, BF16, checkpointing=True)


def test_engines_fill_their_share_with_cache() -> None:
    gib = 2**30
    capacity: dict[str, Any] = {"capacity_bytes": 24 * gib, "utilization": 0.5, "batch_tokens": 8192}
    held = memory.engine(SHAPE, size=2, tensor_parallel=2, **capacity).device
    assert held["weights"] == COUNT
    # 8,192 tokens of a batch: (2 x 200 + 4 x 100) x 2 bytes on two GPUs, and 1.5 GiB for CUDA.
    assert held["buffers"] == 8192 * 800 + 3 * gib // 2
    assert sum(held.values()) == 12 * gib
    # Keys and values of ten layers, five heads of ten on two GPUs: three heads on the fuller one.
    assert memory.kv_bytes_per_token(SHAPE, 2, 2) == 2 * 10 * 3 * 10 * 2
    cpu = memory.engine(
        SHAPE,
        size=4,
        tensor_parallel=1,
        capacity_bytes=None,
        utilization=0.5,
        batch_tokens=8192,
        cpu_kv_bytes=1000,
    )
    # Packed copies of ten layers' projections, and of the head.
    assert cpu.device == {"weights": 4 * COUNT, "kv_cache": 1000, "buffers": 4 * (10 * 90_000 + 100_000)}
    adapted = memory.engine(SHAPE, size=2, tensor_parallel=2, adapter=Adapter(8), **capacity).device
    assert adapted["buffers"] - held["buffers"] == 2 * 128_000 == held["kv_cache"] - adapted["kv_cache"]
    capacity["batch_tokens"] = 16384
    wider = memory.engine(SHAPE, size=2, tensor_parallel=2, **capacity).device
    assert wider["buffers"] - held["buffers"] == 8192 * 800


def test_communication_buffers() -> None:
    assert "buffers" not in trainer(config()).device
    # Gradients that have been collected, and the copy that two ranks reduce.
    assert trainer(config(zero_stage=2)).device["buffers"] == 2 * 2 * COUNT
    assert trainer(config(zero_stage=2, overlap_comm=True)).device["buffers"] == 3 * 2 * COUNT
    # ZeRO-3 gathers two layers (180,400) or the embedding, which is smaller.
    assert trainer(config(zero_stage=3)).device["buffers"] == 2 * 2 * COUNT + 2 * 180_400
