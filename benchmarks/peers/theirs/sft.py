"""TRL's SFTTrainer, packed (its default strategy, best-fit decreasing) or padded (its default)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.peers.theirs.steps import StepTimes, parse, trainer_arguments, use_threads

RANK = 16


def main() -> None:
    options = parse(packing=int, batch=int, accumulate=int, length=int, threads=int, lora=int)
    use_threads(options.threads)
    config = SFTConfig(
        gradient_accumulation_steps=options.accumulate,
        packing=bool(options.packing),
        max_length=options.length,
        **trainer_arguments(options, learning_rate=1e-4 if options.lora else 1e-5),
    )
    peft: Any = None
    if options.lora:
        from peft import LoraConfig

        peft = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    times = StepTimes()
    trainer = SFTTrainer(
        options.model,
        args=config,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        callbacks=[times],
        peft_config=peft,
    )
    notes = {"packing_error": packing_error(trainer)} if options.packing else {}
    times.count(trainer)
    trainer.train()
    times.answer(options.answer, notes=notes)


@torch.no_grad()
def packing_error(trainer: Any) -> float:
    """How far the logits of the first packed batch are from those of its sequences, each in a separate pass.

    Above rounding, one packed sequence would have seen another.
    """
    inputs = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    packed = {name: value for name, value in inputs.items() if name not in ("labels", "seq_idx")}
    logits = model(**packed, use_cache=False).logits[0]
    bounds = inputs["cu_seq_lens_q"].tolist()
    worst = 0.0
    for start, end in list(itertools.pairwise(bounds))[:4]:
        separate = model(input_ids=inputs["input_ids"][:, start:end], use_cache=False).logits[0]
        worst = max(worst, float((logits[start:end] - separate).abs().max()))
    model.train()
    return worst


if __name__ == "__main__":
    main()
