"""`SupervisedRun`, the state and methods that `loop.supervised_loop` uses, and its setup on a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import ExampleBatch
from rayrlhf.config.supervised import SupervisedConfig
from rayrlhf.data.stream import iter_examples
from rayrlhf.runtime.progress import Progress, start_worker
from rayrlhf.runtime.results import RunResult
from rayrlhf.samples import Example
from rayrlhf.storage.folder import DATA_FOLDER, stored
from rayrlhf.storage.run_file import fetched, run_file
from rayrlhf.supervised.dpo import PreferenceTask
from rayrlhf.supervised.evaluate import Evaluation, evaluation_of, is_better
from rayrlhf.supervised.job import SupervisedJob
from rayrlhf.supervised.kd import DistillationTask
from rayrlhf.supervised.kto import KtoTask
from rayrlhf.supervised.prm import StepRewardTask
from rayrlhf.supervised.rm import RewardModelTask
from rayrlhf.supervised.sft import SftTask
from rayrlhf.supervised.task import MicroBatches, Task, TaskSetting
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.random_states import RandomStates

TASKS: dict[str, type[Task]] = {
    "sft": SftTask,
    "rm": RewardModelTask,
    "prm": StepRewardTask,
    "dpo": PreferenceTask,
    "kto": KtoTask,
    "kd": DistillationTask,
}

# (data set, first step) -> iterator of (step, this rank's micro-batches) from there on
Stream = Callable[[str, int], Iterator[tuple[int, list[list[Example]]]]]


@dataclass
class SupervisedRun:
    """A supervised job on one rank. Every method is collective."""

    job: SupervisedJob
    config: SupervisedConfig
    ranks: Ranks
    progress: Progress
    stream: Stream
    task: Task
    random_states: RandomStates
    eval_steps: list[MicroBatches] | None = None  # read at the first evaluation

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one."""
        self.progress.restore([self.task, self.random_states])

    def prepare_reference(self) -> None:
        """With `ref.precompute`, one pass of the reference over the samples, unless its table exists."""
        reference = self.task.reference
        if reference is None or not self.job.ref_tables:
            return
        with self.progress.phase("reference"):
            for split, (file, num_rows) in self.job.ref_tables.items():
                path = fetched(self.config.run, f"{DATA_FOLDER}/{Path(file).name}")
                is_there = self.ranks.min(float(path.is_file())) > 0
                steps = None if is_there else self.stream(f"ref_{split}", 0)
                total = f"{-(-num_rows // self.ranks.world_size)} samples ({split})"
                reference.fill(
                    split,
                    path,
                    steps,
                    lambda done, total=total: self.progress.say(f"reference {done}/{total}"),
                )
                if not is_there and self.ranks.rank == 0:
                    run_file(self.config.run, f"{DATA_FOLDER}/{path.name}")
            reference.forget_model()

    def steps(self) -> Iterator[tuple[int, list[list[Example]]]]:
        """Iterate over the remaining steps, each with this rank's micro-batches."""
        progress = self.progress
        if progress.is_last() or self.patience_exhausted():
            return
        stream = self.stream("train", progress.state.step)
        for step in progress.steps():
            with progress.timer("data"):
                number, micro_batches = next(stream)
            assert number == step
            yield step, micro_batches

    def packing_metrics(
        self, micro_batches: MicroBatches, batches: Sequence[ExampleBatch]
    ) -> dict[str, float]:
        """Metrics of packing: tokens, padding, imbalance, and the share of the tokens that is not computed.
        `batches`: those of the forward and backward passes; KTO packs them without mismatched responses.
        """
        tokens = sum(example.num_tokens for examples in micro_batches for example in examples)
        real = [batch for batch in batches if not batch.is_padding]
        totals = self.ranks.sum_numbers(
            {
                "tokens": float(tokens),
                "samples": float(sum(map(len, micro_batches))),
                "trained": float(sum(batch.num_tokens for batch in real)),
                "rows": float(sum(batch.num_rows for batch in real)),
                "full": float(len(real)),
                "padding": float(len(batches) - len(real)),
            }
        )
        budget = self.config.train.max_tokens_per_micro_batch
        mean = totals["tokens"] / self.ranks.world_size
        return {
            "data/tokens": totals["tokens"],
            "data/samples": totals["samples"],
            "data/micro_batches": float(len(batches)),
            "data/fill": totals["trained"] / max(1.0, totals["full"] * budget),
            "data/prefix_share": 1.0 - totals["rows"] / max(1.0, totals["trained"]),
            "data/padding_fraction": totals["padding"] / (totals["full"] + totals["padding"]),
            "data/imbalance": self.ranks.max(tokens) / max(1.0, mean) - 1.0,
        }

    def end_step(self, metrics: Metrics, packing: dict[str, float]) -> None:
        """Count the step and report it; evaluate and save a checkpoint if due."""
        progress = self.progress
        state = progress.state
        state.step += 1
        seconds = progress.step_seconds()
        reported = metrics.results() | packing | seconds
        reported["train/tokens_per_second"] = reported["data/tokens"] / max(seconds["time/update"], 1e-9)
        reported["train/epoch"] = self.job.order.rows_before(state.step) / self.job.num_rows
        progress.reporter.step(state.step, reported, shown=[])
        if progress.is_due(self.config.eval.every_steps) and not progress.is_last():
            self.evaluate("during")
        if progress.checkpoint_is_due() or progress.is_last() or self.patience_exhausted():
            with progress.phase("checkpoint"):
                progress.save([self.task, self.random_states])

    def evaluate(self, when: str) -> dict[str, Any]:
        """Evaluate on held-out samples: metrics, empty without such samples. "before" runs only before the
        run's first step and is kept for the summary.
        """
        state = self.progress.state
        if not self.job.has_eval or (when == "before" and state.step > 0):
            return {}
        if self.eval_steps is None:
            self.eval_steps = [batches for _, batches in self.stream("eval", 0)]
        with self.progress.phase("eval"):
            parts = [self.task.evaluate(micro_batches) for micro_batches in self.eval_steps]
            result = evaluation_of(self.ranks.gather(parts))
        evaluation = {"metrics": result.metrics}
        if when == "before":
            state.eval_before = evaluation
        self.progress.reporter.evaluation(state.step, when, result.metrics, rows=result.rows)
        if when != "before":
            self._keep_if_best(result)
        return evaluation

    def _keep_if_best(self, result: Evaluation) -> None:
        """Export the model to `best/` if this evaluation is the best so far; all ranks have equal numbers."""
        state = self.progress.state
        key = self.config.eval.metric
        value = result.metrics.get(f"eval/{key}")
        if value is None:
            self.progress.reporter.warn(
                state.step, f"no held-out sample has an eval.metric={key}: best/ is kept"
            )
            return
        best = state.best
        if best and not is_better(key, value, best[key]):
            best["evaluations_since"] += 1
            return
        state.best = {"step": state.step, key: value, "evaluations_since": 0}
        if self.config.checkpoint.best and self.config.eval.every_steps is not None:
            self._export("best")

    def patience_exhausted(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.progress.state.best.get("evaluations_since", 0) >= patience

    def finish(self) -> RunResult:
        """Evaluate after the last step and export; returns the result for the summary."""
        if self.patience_exhausted():
            patience = self.config.eval.patience
            self.progress.announce(
                f"stopped: eval.metric={self.config.eval.metric} has not improved in {patience} evaluations "
                f"(eval.patience={patience})"
            )
        after = self.evaluate("after")
        export = self._export_trained() if self.config.checkpoint.export else None
        return self.progress.result(after=after, export=export)

    def _export_trained(self) -> str:
        if self.job.num_sampled:
            with self.progress.phase("score_training_rows"):
                self.task.before_export(self._sample_of_training_data)
        return self._export("export")

    def _sample_of_training_data(self) -> Iterator[MicroBatches]:
        """Iterate over a sample of the training rows, one step's worth at a time, reporting progress."""
        done, total = 0, self.job.num_sampled
        for _, micro_batches in self.stream("sample", 0):
            self.progress.say(f"score training rows {min(done, total)}/{total}")
            yield micro_batches
            done += self.job.rows_per_pass

    def _export(self, name: str) -> str:
        path = Path(self.config.run.path) / name
        with self.progress.phase("export"):
            self.task.export(path)
            return stored(self.config.run, name, write=self.ranks.rank == 0)


def set_up(job: SupervisedJob) -> SupervisedRun:
    """Build a `SupervisedRun`: this rank's shard of the model, and its data."""
    config: Any = job.config
    progress = start_worker(
        config, run_id=job.run_id, board=job.board, threads=job.threads_per_worker, fixed=job.fixed
    )
    ranks = progress.ranks
    progress.say("loading the model")
    task = TASKS[config.job](TaskSetting(config, ranks, job.teacher_app))

    def stream(name: str, first: int) -> Iterator[tuple[int, list[list[Example]]]]:
        shard: Any = ray.train.get_dataset_shard(name)
        return iter_examples(shard, ranks.rank, first)

    # From here on, random numbers differ per rank.
    random_states = RandomStates(config.run.seed, rank=ranks.rank, world_size=ranks.world_size)
    return SupervisedRun(job, config, ranks, progress, stream, task, random_states)
