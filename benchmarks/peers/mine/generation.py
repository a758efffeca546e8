"""Response tokens per second of one engine: behind Serve, as a run's workers ask it, or vLLM alone in this
process.

`python -m benchmarks.peers.mine.generation served|bare CONFIG ANSWER STEPS THREADS`; both have the same
engine arguments, prompts, seeds and sampling.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rayrlhf.runtime.process_environment import set_process_environment

set_process_environment()  # Ray reads its variables when it is imported

from benchmarks.peers.mine.engines import read_config, running_engines, settings_of  # noqa: E402
from rayrlhf.config.policy import PolicyRunConfig  # noqa: E402
from rayrlhf.data.ends import ResponseEnds  # noqa: E402
from rayrlhf.models.load import load_tokenizer  # noqa: E402
from rayrlhf.rollout.client import RolloutClient, sample_seed, vllm_params  # noqa: E402
from rayrlhf.samples import Prompt  # noqa: E402

ENDS = ResponseEnds()


def prompts_of(config: PolicyRunConfig, step: int) -> list[Prompt]:
    """Other ones in every step, so that no prefix is cached."""
    path = Path(config.data.train[0].path.partition("@")[2])
    lines = path.read_text().splitlines()
    count = config.rollout.prompts_per_step
    tokenizer = load_tokenizer(config.model.path)
    texts = [json.loads(lines[i % len(lines)])["prompt"] for i in range(step * count, (step + 1) * count)]
    return [Prompt(i, tokenizer(text).input_ids, text) for i, text in enumerate(texts)]


async def served(config: PolicyRunConfig, steps: int, threads: int) -> dict[str, Any]:
    with running_engines(config, threads) as engines:
        client = RolloutClient(engines.handle, config.rollout, seed=0, ends_of=lambda _: ENDS)
        batches = [prompts_of(config, step) for step in range(steps)]

        async def group(prompt: Prompt, group_id: int) -> int:
            stream = client.samples(
                prompt,
                group_id=group_id,
                group_size=config.rollout.group_size,
                min_version=0,
                sampling=config.rollout.sampling,
            )
            return sum([len(sample.response_ids) async for sample in stream])

        began_at, seconds, tokens = time.time(), [], []
        for step, batch in enumerate(batches):
            start = time.perf_counter()
            counts = await asyncio.gather(
                *(group(prompt, step * len(batch) + i) for i, prompt in enumerate(batch))
            )
            seconds.append(time.perf_counter() - start)
            tokens.append(sum(counts))
    return {"began_at": began_at, "seconds": seconds, "tokens": tokens}


def bare(config: PolicyRunConfig, steps: int, threads: int) -> dict[str, Any]:
    settings = settings_of(config, threads, None)
    os.environ.update(settings.env_vars)
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**settings.engine_args), enable_multiprocessing=False)
    batches = [prompts_of(config, step) for step in range(steps)]
    began_at, seconds, tokens = time.time(), [], []
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        for i, prompt in enumerate(batch):
            group_id = step * len(batch) + i
            for index in range(config.rollout.group_size):
                params = vllm_params(config.rollout.sampling, ENDS, seed=sample_seed(0, group_id, index))
                engine.add_request(
                    f"{group_id}-{index}", {"prompt_token_ids": prompt.prompt_ids}, SamplingParams(**params)
                )
        count = 0
        while engine.has_unfinished_requests():
            outputs: list[Any] = [output for output in engine.step() if output.finished]
            count += sum(len(output.outputs[0].token_ids) for output in outputs)
        seconds.append(time.perf_counter() - start)
        tokens.append(count)
    return {"began_at": began_at, "seconds": seconds, "tokens": tokens}


def main() -> None:
    how, config_path, answer, steps, threads = sys.argv[1:]
    config = read_config(Path(config_path))
    if how == "served":
        found = asyncio.run(served(config, int(steps), int(threads)))
    else:
        found = bare(config, int(steps), int(threads))
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
