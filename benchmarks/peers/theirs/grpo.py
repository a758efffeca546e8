"""TRL's GRPOTrainer with transformers' generate; its vLLM modes need a GPU."""

from __future__ import annotations

import time
from typing import Any

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.peers.theirs.rewards import variety
from benchmarks.peers.theirs.steps import StepTimes, parse, trainer_arguments, use_threads


def main() -> None:
    options = parse(group=int, batch=int, accumulate=int, response=int, threads=int)
    use_threads(options.threads)
    config = GRPOConfig(
        gradient_accumulation_steps=options.accumulate,
        num_generations=options.group,
        max_completion_length=options.response,
        **trainer_arguments(options, learning_rate=1e-6),
    )
    times = StepTimes()
    trainer = GRPOTrainer(
        options.model,
        reward_funcs=variety,
        args=config,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        callbacks=[times],
    )
    generating = _timed(trainer, "_generate")
    trainer.train()
    steady = generating[1:]
    lengths = [
        log["completions/mean_length"]
        for log in trainer.state.log_history
        if "completions/mean_length" in log
    ]
    times.answer(
        options.answer,
        parts={"time/generate": sum(steady) / max(1, len(steady))},
        notes={"response_tokens": lengths[-1]},
    )


def _timed(owner: Any, name: str) -> list[float]:
    """Seconds of each call of a method, as they happen."""
    original, seconds = getattr(owner, name), []

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    return seconds


if __name__ == "__main__":
    main()
