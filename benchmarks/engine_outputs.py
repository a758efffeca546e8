"""What the log-probability of a token costs an engine's thread after it is computed, as vLLM keeps it by
default and as `rayrlhf.rollout.vllm_outputs` does.

    python -m benchmarks.engine_outputs

Microseconds per token, for 512 sequences of 128 tokens that take turns, as in a decode step; the median of
alternating rounds. Detokenising the response and scheduling are not in it: they are the same.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from jobs.demo.model import ensure_model
from rayrlhf.models.load import load_tokenizer
from rayrlhf.rollout.vllm_outputs import flat

SEQUENCES, TOKENS, ROUNDS = 512, 128, 5


def main() -> None:
    tokenizer = load_tokenizer(f"{ensure_model()}")
    generator = np.random.default_rng(0)
    steps = [
        [LogprobsLists(ids[None], np.array([[-1.0]], np.float32), np.array([3])) for ids in row]
        for row in generator.integers(100, 40_000, (TOKENS, SEQUENCES, 1))
    ]
    defaults = SimpleNamespace(num_logprobs=0, prompt_logprobs=None, flat_logprobs=False)
    ways: dict[str, tuple[Any, Any]] = {
        "vLLM's default": (tokenizer, defaults),
        "flat, without texts": (None, flat({"logprobs": 0})),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (texts, params) in ways.items():
            found[name].append(_seconds(texts, params, steps))
    for name, seconds in found.items():
        print(f"{name:22s} {1e6 * statistics.median(seconds) / (SEQUENCES * TOKENS):5.2f} us per token")


def _seconds(tokenizer: Any, params: Any, steps: list[list[LogprobsLists]]) -> float:
    request: Any = SimpleNamespace(sampling_params=params)
    make = LogprobsProcessor.from_new_request
    processors = [make(tokenizer=tokenizer, request=request) for _ in range(SEQUENCES)]
    start = time.perf_counter()
    for step in steps:
        for processor, lists in zip(processors, step, strict=True):
            processor._update_sample_logprobs(lists)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
