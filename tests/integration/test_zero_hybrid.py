"""A hybrid's sequences go through it one at a time, also where ZeRO-3's ranks have unequally many of them."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import Lfm2Config, Lfm2ForCausalLM

from tests.integration.test_zero_parity import WORLD_SIZE, plain_adamw, train

pytestmark = [pytest.mark.slow, pytest.mark.long]

VARIANTS = [({"zero_stage": 3}, "whole"), ({"zero_stage": 3, "gradient_checkpointing": True}, "whole")]


def work(rank: int, folder: str) -> None:
    """One of the ranks; their second micro-batches have one sequence and two."""
    # DeepSpeed reads these, although the group is there already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29617")
    timeout = datetime.timedelta(seconds=60)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timeout, world_size=WORLD_SIZE, rank=rank)
    result = train({"model": f"{folder}/model", "variants": VARIANTS})
    if rank == 0:
        torch.save(result["results"], f"{folder}/results.pt")
    dist.destroy_process_group()


def test_5_ranks_with_unequally_many_sequences_train_a_hybrid(tmp_path: Path) -> None:
    config = Lfm2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    path = str(tmp_path / "model")
    Lfm2ForCausalLM(config).save_pretrained(path)
    spawn(work, (str(tmp_path),), nprocs=WORLD_SIZE)
    losses, norms, weights = plain_adamw(path, "whole")
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert len(results) == len(VARIANTS)
    for got_losses, got_norms, got_weights, _, unchanged in results:
        assert got_losses == pytest.approx(losses, abs=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-5)
        for name, wanted in weights.items():
            distance = (torch.from_numpy(got_weights[name].copy()) - wanted).norm()
            assert distance < 1e-5 * wanted.norm(), f"{name}: relative distance {distance:.1e}"
        assert unchanged
