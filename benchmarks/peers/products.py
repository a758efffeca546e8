"""The machine's limit: what fp32 and bf16 matrix products of the model's own shapes reach, forward and
backward.

`python -m benchmarks.peers.products ANSWER THREADS` in either environment: torch's build is the same.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

HIDDEN, INTERMEDIATE, KV, VOCABULARY, LAYERS = 576, 1536, 192, 49_152, 30  # SmolLM2-135M
NUM_TOKENS = 1024
ROUNDS = 3
BF16_SECONDS = 4.0  # where a core has no bf16 products, they would take minutes


class Product(NamedTuple):
    """A linear layer [out, into]; `times` of them in the model."""

    into: int
    out: int
    times: int


# The head counts, though its weights are the embedding's: it is a product, and the embedding is none.
PRODUCTS = (
    Product(HIDDEN, HIDDEN, 2 * LAYERS),  # q, o
    Product(HIDDEN, KV, 2 * LAYERS),  # k, v
    Product(HIDDEN, INTERMEDIATE, 2 * LAYERS),  # gate, up
    Product(INTERMEDIATE, HIDDEN, LAYERS),  # down
    Product(HIDDEN, VOCABULARY, 1),  # head
)
NUM_WEIGHTS = sum(into * out * times for into, out, times in PRODUCTS)


def limit(dtype: torch.dtype, *, max_seconds: float | None = None) -> float:
    """FLOP/s of all products of one training step: forward, towards the input and towards the weights.

    Each shape's fastest of `ROUNDS`, weighted with how often the model has it. With `max_seconds`, shapes are
    left out once that much time is spent.
    """
    began = time.perf_counter()
    flops = seconds = 0.0
    for into, out, times in PRODUCTS:
        if max_seconds is not None and time.perf_counter() - began > max_seconds:
            break
        x, w, dy = (
            torch.randn(shape).to(dtype) for shape in ((NUM_TOKENS, into), (out, into), (NUM_TOKENS, out))
        )
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for left, right in ((x, w.T), (dy, w), (dy.T, x)):
                torch.matmul(left, right)
            best = min(best, time.perf_counter() - start)
        flops += 6 * NUM_TOKENS * into * out * times
        seconds += best * times
    return flops / seconds


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    found = {"fp32": limit(torch.float32), "bf16": limit(torch.bfloat16, max_seconds=BF16_SECONDS)}
    Path(sys.argv[1]).write_text(json.dumps(found))
