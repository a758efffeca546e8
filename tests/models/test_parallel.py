"""What ranks compute of a shared stream, put together, is what one process computes of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.models.load import (
    checkpoint_activations,
    load_critic,
    load_policy,
    load_reward_model,
    load_step_model,
)
from rayrlhf.models.parallel import PackedModel, Share, check_layers

NUM_RANKS = 3
# The last one leaves two ranks of three without a token.
STREAMS = [[7, 1, 12, 5], [40], [13, 13], [1, 1]]
KINDS = ("policy", "checkpointed policy", "critic", "scorer", "steps")


def load(kind: str, path: str) -> PackedModel:
    model, cpu = TrainedModelConfig(path=path), torch.device("cpu")
    torch.manual_seed(5)
    match kind:
        case "critic":
            module = load_critic(model, path, device=cpu)
        case "scorer":
            module = load_reward_model(model, path, device=cpu)
        case "steps":
            module = load_step_model(model, path, device=cpu)
        case _:
            module = load_policy(model, path, device=cpu, chunk_tokens=3)
    if kind == "checkpointed policy":
        checkpoint_activations(module.causal_lm)
    for name, parameter in module.named_parameters():
        if name.startswith("head.") and "policy" not in kind:  # new heads are 0
            nn.init.normal_(parameter, std=0.1)
    return module


def outputs_and_gradients(
    module: Any, kind: str, lengths: list[int]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    ids = torch.randint(8, 264, (total,), generator=generator)
    mask = (torch.rand(total, generator=generator) < 0.6).float()
    stream = ids, position_ids_of(lengths), cu_seqlens_of(lengths)
    out = module(*stream, mask, 0.7) if "policy" in kind else module(*stream, *[mask] * (kind == "steps"))
    outputs = list(out) if isinstance(out, tuple) else [out]
    # A loss that is not linear in any of them, and the same on all ranks.
    weighed = [
        (output + 0.3) ** 2 * torch.arange(1, 1 + output.numel()).view_as(output) for output in outputs
    ]
    loss = torch.cat([part.flatten() for part in weighed]).sum()
    module.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients


def compute(rank: int, rendezvous: str, model: str, results: str) -> None:
    """One of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
    pair: Any = dist.new_group([0, 1])
    found = {}
    everyone: Any = dist.group.WORLD
    for size, group in ((NUM_RANKS, everyone), (2, pair)):
        for kind in KINDS if rank < size else ():
            module = load(kind, model)
            module.sequence_group = group
            for lengths in STREAMS:
                found[size, kind, str(lengths)] = outputs_and_gradients(module, kind, lengths)
    torch.save(found, Path(results) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(compute, (str(folder / "rendezvous"), tiny_model, str(folder)), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, NUM_RANKS])
def test_ranks_compute_what_one_process_does(
    of_ranks: list[Any], tiny_model: str, kind: str, size: int
) -> None:
    module = load(kind, tiny_model)
    for lengths in STREAMS:
        wanted, gradients = outputs_and_gradients(module, kind, lengths)
        results = [of_ranks[rank][size, kind, str(lengths)] for rank in range(size)]
        for outputs, _ in results:
            for output, expected in zip(outputs, wanted, strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        for name, expected in gradients.items():
            parts = [of_rank[name] for _, of_rank in results if name in of_rank]
            distance = (sum(parts) - expected).norm()
            assert distance <= 1e-5 * expected.norm().clamp(min=1e-3), (lengths, name, distance)


def test_shares_cover_a_stream_once_and_are_equally_heavy() -> None:
    def share(rank: int, size: int, lengths: list[int]) -> Share:
        return Share.of_rank(cu_seqlens_of(lengths), sum(lengths), rank, size)

    held = [share(rank, 3, [7, 1, 12, 5]).positions.tolist() for rank in range(3)]
    # 25 tokens in six blocks of five: the first with the last, which is padding.
    assert held[0] == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]
    assert sorted(position for positions in held for position in positions) == list(range(30))
    # Pairs of a token and one that it attends to, of one long sequence: nearly as many for each rank.
    pairs = [
        sum(
            position - piece.start + 1
            for piece in share(rank, 4, [4000]).pieces
            for position in range(piece.first, piece.stop)
        )
        for rank in range(4)
    ]
    assert sum(pairs) == 4000 * 4001 // 2 and max(pairs) == min(pairs)


def test_a_model_whose_layers_mix_tokens_otherwise_is_refused() -> None:
    share = Share.of_rank(cu_seqlens_of([6]), 6, rank=0, size=2)
    share.num_attended = 8
    check_layers(8, share)
    with pytest.raises(
        ValueError, match=r"24 of this model's 32 layers .* set model\.sequence_parallel to 1"
    ):
        check_layers(32, share)
