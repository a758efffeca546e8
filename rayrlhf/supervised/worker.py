"""What a supervised worker holds and does: the verbs of `supervised.loop`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray.train

from rayrlhf.config.supervised import SupervisedConfig
from rayrlhf.data.example_stream import iter_examples
from rayrlhf.runtime.worker import TrainingWorker
from rayrlhf.samples import Example
from rayrlhf.supervised.dpo import PreferenceTask
from rayrlhf.supervised.evaluate import Evaluation, evaluation_of, is_better
from rayrlhf.supervised.job import SupervisedJob
from rayrlhf.supervised.kd import DistillationTask
from rayrlhf.supervised.kto import KtoTask
from rayrlhf.supervised.prm import StepRewardTask
from rayrlhf.supervised.rm import RewardModelTask
from rayrlhf.supervised.sft import SftTask
from rayrlhf.supervised.task import MicroBatches, Task, TaskSetting
from rayrlhf.train import collectives
from rayrlhf.train.checkpoint import Saved, restore

TASKS: dict[str, type[Task]] = {
    "sft": SftTask,
    "rm": RewardModelTask,
    "prm": StepRewardTask,
    "dpo": PreferenceTask,
    "kto": KtoTask,
    "kd": DistillationTask,
}


class SupervisedWorker(TrainingWorker):
    def __init__(self, job: SupervisedJob) -> None:
        super().__init__(
            job.config, run_id=job.run_id, board=job.board, threads=job.threads_per_worker, fixed=job.fixed
        )
        self.job = job
        self.config: SupervisedConfig = job.settings
        self.say("loading the model")
        self.task: Task = TASKS[job.config.job](TaskSetting(job.config, job.teacher_app))
        self.random_states = self.own_random_states()
        self.metrics: dict[str, float] = {}
        self.last_evaluation: dict[str, Any] = {}
        self._eval_steps: list[MicroBatches] | None = None

    @property
    def saved(self) -> Sequence[Saved]:
        return [self.task, self.random_states]

    # The verbs of the loop

    def resume(self) -> None:
        self.state = restore(self.saved)
        if self.state.step:
            self.announce(f"resuming after step {self.state.step}")

    def ask_reference(self) -> None:
        """With `ref.precompute`, one pass over the samples, unless a former run has left its answers."""
        reference = getattr(self.task, "reference", None)
        if reference is None or not self.job.ref_tables:
            return
        with self.phase("reference"):
            for split, (file, num_rows) in self.job.ref_tables.items():
                steps = () if Path(file).is_file() else iter_examples(_shard(f"ref_{split}"), self.rank)
                total = f"{-(-num_rows // self.world_size)} samples ({split})"
                reference.fill(
                    split, Path(file), steps, lambda done, total=total: self.say(f"reference {done}/{total}")
                )
            reference.forget_model()

    def evaluate_before(self) -> None:
        if self.state.step == 0:
            self.evaluate("before")

    def steps(self) -> Iterator[tuple[int, list[list[Example]]]]:
        """The steps from where the run stands to its end, with this rank's packed samples."""
        if self.is_last() or self.has_lost_patience():
            return
        stream = iter_examples(_shard("train"), self.rank, self.state.step)
        for step in self.count_steps():
            with self.timer("data"):
                found, micro_batches = next(stream)
            assert found == step
            yield step, micro_batches

    def learn(self, micro_batches: MicroBatches, step: int) -> None:
        self.metrics |= self.task.update(micro_batches, step=step) | self._packing(micro_batches)
        self.state.step = step + 1

    def _packing(self, micro_batches: MicroBatches) -> dict[str, float]:
        """How full the micro-batches are. Collective."""
        tokens = sum(example.num_tokens for examples in micro_batches for example in examples)
        full = sum(bool(examples) for examples in micro_batches)
        totals = collectives.sum_metrics(
            {
                "tokens": float(tokens),
                "samples": float(sum(map(len, micro_batches))),
                "full": float(full),
                "fillers": float(len(micro_batches) - full),
            }
        )
        budget = self.config.train.max_tokens_per_micro_batch
        mean = totals["tokens"] / self.world_size
        return {
            "data/tokens": totals["tokens"],
            "data/samples": totals["samples"],
            "data/micro_batches": float(len(micro_batches)),
            "data/fill": totals["tokens"] / max(1.0, totals["full"] * budget),
            "data/filler_fraction": totals["fillers"] / (totals["full"] + totals["fillers"]),
            "data/imbalance": collectives.max_over_ranks(tokens) / max(1.0, mean) - 1.0,
        }

    def end_step(self) -> None:
        """Report; evaluate and save where it is due."""
        seconds = self.step_seconds()
        metrics = self.metrics | seconds
        metrics["train/tokens_per_second"] = metrics["data/tokens"] / max(seconds["time/update"], 1e-9)
        metrics["train/epoch"] = self.state.step * self.config.train.samples_per_step / self.job.num_rows
        self.metrics = {}
        self.reporter.step(self.state.step, metrics, shown=[])
        if self.is_due(self.config.eval.every_steps) and not self.is_last():
            self.evaluate("during")
        if self.checkpoint_is_due() or self.is_last() or self.has_lost_patience():
            with self.phase("checkpoint"):
                self.save_state()

    def evaluate(self, when: str) -> None:
        """Held-out samples; the evaluation before the first step is kept for the summary. Collective."""
        if not self.job.has_eval:
            return
        if self._eval_steps is None:
            self._eval_steps = [batches for _, batches in iter_examples(_shard("eval"), self.rank)]
        with self.phase("eval"):
            told = [self.task.evaluate(micro_batches) for micro_batches in self._eval_steps]
            result = evaluation_of(collectives.gather_lists(told))
        if when == "before":
            self.state.eval_before = {"metrics": result.metrics}
        self.last_evaluation = {"metrics": result.metrics}
        self.reporter.evaluation(self.state.step, when, result.metrics, rows=result.rows)
        if when != "before":
            self._keep_if_best(result)

    def _keep_if_best(self, result: Evaluation) -> None:
        """`best/` holds the model of the best evaluation so far; every rank has the same numbers."""
        key = self.config.eval.metric
        value = result.metrics.get(f"eval/{key}")
        if value is None:
            self.reporter.warn(self.state.step, f"no held-out sample has an eval.metric={key}: best/ stays")
            return
        best = self.state.best
        if best and not is_better(key, value, best[key]):
            best["evaluations_since"] += 1
            return
        self.state.best = {"step": self.state.step, key: value, "evaluations_since": 0}
        if self.config.checkpoint.best and self.config.eval.every_steps is not None:
            self._export("best")

    def has_lost_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.best.get("evaluations_since", 0) >= patience

    def finish(self) -> dict[str, Any]:
        """The evaluation after the last step, the export, and what the summary is made of."""
        if self.has_lost_patience():
            patience = self.config.eval.patience
            self.announce(
                f"stopped: eval.metric={self.config.eval.metric} has not improved in {patience} evaluations "
                f"(eval.patience={patience})"
            )
        self.last_evaluation = {}
        self.evaluate("after")
        export = self._export_trained() if self.config.checkpoint.export else None
        return self.result(after=self.last_evaluation, export=export)

    def _export_trained(self) -> str:
        if self.job.num_sampled:
            with self.phase("score_training_rows"):
                self.task.before_export(self._sample_of_training_data)
        return self._export("export")

    def _sample_of_training_data(self) -> Iterator[MicroBatches]:
        """A sample of the training rows, in parts of one step each; says how far it is."""
        done, total = 0, self.job.num_sampled
        for _, micro_batches in iter_examples(_shard("sample"), self.rank):
            self.say(f"score training rows {min(done, total)}/{total}")
            yield micro_batches
            done += self.config.train.samples_per_step

    def _export(self, name: str) -> str:
        path = Path(self.config.run.path) / name
        with self.phase("export"):
            self.task.export(path)
        return str(path)


def _shard(name: str) -> Any:
    return ray.train.get_dataset_shard(name)
