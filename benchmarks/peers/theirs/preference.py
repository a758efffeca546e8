"""TRL's DPOTrainer and RewardTrainer, with their default batches: pairs padded to the longest."""

from __future__ import annotations

from datasets import load_dataset

from benchmarks.peers.theirs.steps import StepTimes, parse, trainer_arguments, use_threads


def main() -> None:
    options = parse(job=str, batch=int, length=int, threads=int, precompute=int)
    use_threads(options.threads)
    shared = trainer_arguments(options, learning_rate=1e-5) | {"max_length": options.length}
    rows = load_dataset("json", data_files=options.data, split="train")
    times = StepTimes()
    if options.job == "dpo":
        from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

        config = DPOConfig(precompute_ref_log_probs=bool(options.precompute), **shared)
        trainer = DPOTrainer(options.model, args=config, train_dataset=rows, callbacks=[times])
    else:
        from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

        config = RewardConfig(**shared)
        trainer = RewardTrainer(options.model, args=config, train_dataset=rows, callbacks=[times])
    times.count(trainer)
    trainer.train()
    times.answer(options.answer)


if __name__ == "__main__":
    main()
