"""How often the workers of a step reduce and gather: counted in the real loop, on a tiny model."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayrlhf.policy.loop import policy_loop
from rayrlhf.train import collectives
from tests.policy.one_process import config_of, run_of
from tests.tiny_model import make_tiny_model

NUM_STEPS = 4
BARRIERS = 3  # of `Colocation` in a step of engines that sleep
PUSH_GATHERS = 2  # of `DirectSender` in a push


def counted() -> dict[str, float]:
    """Per step of GRPO with a KL term and four mini-batches."""
    counts: Counter[str] = Counter()

    def count(name: str, size: Callable[..., int]) -> None:
        called = getattr(collectives, name)

        def wrapper(*arguments: Any) -> Any:
            counts[name] += 1
            counts[f"{name} before"] += size(*arguments)
            return called(*arguments)

        setattr(collectives, name, wrapper)

    count("sum_over_ranks", lambda _: 1)
    count("_max_over_ranks", len)  # one all-reduce for each
    count("gather_lists", lambda _: 1)
    count("exchange", lambda _: 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        model = make_tiny_model(folder / "model")
        algorithm = {
            "advantage": "grpo",
            "kl_coef": 0.05,
            "kl_in": "loss",
            "kl_estimator": "k3",
            "mini_batches": 4,
        }
        config = config_of(model, folder, algorithm=algorithm, train={"num_steps": NUM_STEPS, "lr": 1e-3})
        policy_loop(run_of(config)[0])
        dist.destroy_process_group()
    per_step = {name: number / NUM_STEPS for name, number in counts.items()}
    return {
        "all_reduces": per_step["sum_over_ranks"] + per_step["_max_over_ranks"] + BARRIERS,
        "all_reduces_before": per_step["sum_over_ranks before"]
        + per_step["_max_over_ranks before"]
        + BARRIERS,
        "gathers": per_step["gather_lists"] + per_step["exchange"] + PUSH_GATHERS,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(counted()))
