"""Seconds until two engines hold the weights of a 135M model in fp32, and of copying as many bytes in memory.

`python -m benchmarks.peers.mine.push CONFIG ANSWER STEPS THREADS`; in turn in one process: a push, a copy, …
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rayrlhf.runtime.process_environment import set_process_environment

set_process_environment()  # Ray reads its variables when it is imported

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.peers.mine.engines import read_config, running_engines  # noqa: E402
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors  # noqa: E402
from rayrlhf.weights.sync import WeightSync  # noqa: E402

ROUTE: Any = "object_store"  # what rollout.weight_sync.backend: auto takes on CPUs


def main() -> None:
    config_path, answer, steps, threads = sys.argv[1:]
    config = read_config(Path(config_path))
    torch.set_num_threads(int(threads))
    with running_engines(config, int(threads)) as engines:
        sync = WeightSync(
            engines.store,
            engines.handle,
            route=ROUTE,
            rank=0,
            device=torch.device("cpu"),
            num_engines=config.rollout.num_engines,
            bucket_bytes=config.rollout.weight_sync.bucket_bytes,
            timeout_seconds=config.rollout.weight_sync.timeout_seconds,
            start_timeout_seconds=config.rollout.start_timeout_seconds,
            gathered=lambda _: nullcontext(),
            gather=lambda items: items,
        )
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())  # tied ones once
        source = torch.ones(num_bytes // 4)
        copy = torch.empty_like(source).fill_(0.0)
        began_at, pushes, copies, failures = time.time(), [], [], []
        for version in range(1, int(steps) + 1):
            start = time.perf_counter()
            failures.append(sync.push(checkpoint_tensors(model), version))
            pushes.append(time.perf_counter() - start)
            start = time.perf_counter()
            copy.copy_(source)
            copies.append(time.perf_counter() - start)
        sync.close()
    found = {
        "began_at": began_at,
        "pushes": pushes,
        "copies": copies,
        "bytes": num_bytes,
        "fallbacks": sum(each is not None for each in failures),
    }
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
