"""Defaults are resolved to fit the available devices: slots, group size, micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.capacity.budget import budget_of
from rayrlhf.capacity.gpu_types import GIB, parse_gpus
from rayrlhf.capacity.micro_batch import longest_sample, sized_for_gpu, sized_for_host
from rayrlhf.commands.plan import main
from rayrlhf.config.job_kinds import load_any
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import SftRunConfig
from rayrlhf.placement.plan import DATA_CPUS, plan_placement, shortfall
from rayrlhf.placement.preset import with_preset
from tests.checkpoint_files import write_checkpoint

SEVEN_B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def shortest(folder: Path, **changes: Any) -> dict[str, Any]:
    """Model, data, reward, algorithm and number of steps; nothing about devices or sizes."""
    return {
        "run": {"name": "shortest"},
        "model": {"path": str(folder)},
        "data": {"train": "p.jsonl"},
        "algorithm": {"advantage": "grpo"},
        "reward": {"sources": [{"type": "function", "function": "a:b"}]},
        "train": {"num_steps": 1},
        **changes,
    }


def on(config: PolicyRunConfig, *, cpus: float, gpus: float = 0.0) -> PolicyRunConfig:
    total = {"CPU": cpus, "GPU": gpus}
    each = int(gpus > 0)
    return with_preset(
        config,
        plan_placement,
        lambda spec: shortfall(spec, total=total, free=total, gpus_per_slot=each) is None,
    )


@pytest.mark.parametrize(
    ("cpus", "gpus", "preset", "slots"),
    [
        (2, 0, "colocate_all", 1),  # actor, engine and reference share one of the two cores' slots
        (8, 1, "colocate_all", 1),
        (3.5, 0, "disaggregated", 3),
        (8, 2, "colocate_actor_ref", 2),
        (8, 3, "disaggregated", 3),
        (1, 0, "disaggregated", 3),  # fits nowhere: the error states what the largest preset needs
    ],
)
def test_the_shortest_grpo_fits_one_gpu_or_two_cores(
    cpus: float, gpus: float, preset: str, slots: int, tmp_path: Path
) -> None:
    """It does not require three slots."""
    assert DATA_CPUS == 0.5
    config = on(PolicyRunConfig.model_validate(shortest(tmp_path)), cpus=cpus, gpus=gpus)
    assert (config.placement.preset, plan_placement(config).num_slots) == (preset, slots)
    assert config.rollout.group_size == 8
    if preset == "colocate_all":
        assert config.engines_sleep(on_gpu=gpus > 0) is (gpus > 0) and not config.ref_is_served


def test_a_given_preset_is_kept_and_a_contradicting_one_is_not_chosen(tmp_path: Path) -> None:
    given = PolicyRunConfig.model_validate(shortest(tmp_path, placement={"preset": "disaggregated"}))
    assert on(given, cpus=1) is given
    # Replicas of a reference require separate slots.
    replicas = PolicyRunConfig.model_validate(shortest(tmp_path, ref={"num_replicas": 2}))
    assert on(replicas, cpus=1.5).placement.preset == "disaggregated"
    # An asynchronous engine runs at the same time as the trainer.
    ahead = PolicyRunConfig.model_validate(shortest(tmp_path, rollout={"max_staleness": 1}))
    assert on(ahead, cpus=1.5).placement.preset == "disaggregated"


@pytest.mark.parametrize(
    ("advantage", "size"), [("grpo", 8), ("rloo", 8), ("dr_grpo", 8), ("gae", 1), ("reinforce_pp", 1)]
)
def test_groups_are_as_large_as_the_estimator_needs(advantage: str, size: int, tmp_path: Path) -> None:
    config = PolicyRunConfig.model_validate(shortest(tmp_path, algorithm={"advantage": advantage}))
    assert config.rollout.group_size == size
    four = shortest(tmp_path, algorithm={"advantage": advantage}, rollout={"group_size": 4})
    assert PolicyRunConfig.model_validate(four).rollout.group_size == 4


@pytest.mark.parametrize("gpu", ["1x24GB", "1xA100-80", "1xH200-141"])
def test_micro_batches_are_as_large_as_the_gpu_holds(gpu: str, tmp_path: Path) -> None:
    """The next larger size would not fit, or is the largest of all."""
    write_checkpoint(tmp_path, **SEVEN_B)
    tree = {
        "run": {"name": "x"},
        "model": {"path": str(tmp_path), "lora": {}},
        "data": {"train": "p.jsonl", "max_tokens": 512},
    }
    config, (_, device) = SftRunConfig.model_validate(tree), parse_gpus(gpu)
    size = sized_for_gpu(config, device).train.max_tokens_per_micro_batch

    def room(tokens: int) -> bool:
        sizes = {"max_tokens_per_micro_batch": tokens, "logprob_chunk_tokens": 2048}
        train = config.train.model_copy(update=sizes)
        budget = budget_of(config.model_copy(update={"train": train}), gpu=device)
        return max(budget.peak_bytes) <= 0.95 * device.usable_bytes

    assert size >= longest_sample(config) == 512 and room(size)
    assert size == 16384 or not room(2 * size)
    assert sized_for_gpu(config, device).train.logprob_chunk_tokens == 2048


def test_a_given_size_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SEVEN_B)
    given = {"max_tokens_per_micro_batch": 5000, "logprob_chunk_tokens": 64}
    tree = shortest(tmp_path, train={"num_steps": 1, **given})
    config = PolicyRunConfig.model_validate(tree)
    assert sized_for_gpu(config, parse_gpus("1xH200-141")[1]) is config


def test_nothing_fits_and_nothing_is_known(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SEVEN_B)
    config = PolicyRunConfig.model_validate(shortest(tmp_path))
    assert sized_for_gpu(config, parse_gpus("1x4GB")[1]).train.max_tokens_per_micro_batch == 8192
    unknown = PolicyRunConfig.model_validate(shortest(tmp_path / "nowhere"))
    assert sized_for_gpu(unknown, parse_gpus("1x80GB")[1]).train.max_tokens_per_micro_batch == 8192


def test_micro_batches_fit_the_memory_of_a_machine_without_gpus(tmp_path: Path) -> None:
    """135M parameters on two cores: 8,192 tokens keep 12 GB of activations, half of a machine's 24."""
    write_checkpoint(
        tmp_path,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    config = on(PolicyRunConfig.model_validate(shortest(tmp_path)), cpus=2)
    sizes = [
        sized_for_host(config, memory * GIB).train.max_tokens_per_micro_batch for memory in (256, 24, 16)
    ]
    assert sized_for_host(config, 24 * GIB).train.logprob_chunk_tokens == 256, "of a CPU's cache"
    assert sizes[0] == 16384 and sizes == sorted(sizes, reverse=True) and sizes[2] < 8192
    assert sizes[2] >= longest_sample(config) == 1024 + 256


def test_the_plan_shows_what_a_driver_would_fill_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", **SEVEN_B)
    (tmp_path / "config.yaml").write_text(json.dumps(shortest(tmp_path / "model")))
    argv = [str(tmp_path / "config.yaml"), "model.lora={}", "train.gradient_checkpointing=true"]
    assert main([*argv, "--gpus", "1xH200-141"]) == 0
    shown = capsys.readouterr().out
    assert "placement.preset=colocate_all, 1 slot on 1 x H200-141" in shown
    filled = sized_for_gpu(load_any([*argv, "placement.preset=colocate_all"]), parse_gpus("1xH200-141")[1])
    assert f"{filled.train.max_tokens_per_micro_batch:,} tokens x" in shown
    # 15 GiB of the actor's weights stay on the engine's GPU: 0.85 of 141 GiB would be too much.
    assert filled.rollout.gpu_memory_utilization == 0.75
    assert "engine cache: 0.75 x 141.0 GiB" in shown
