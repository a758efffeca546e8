"""The training loop of SFT, reward models, DPO, KTO and distillation: all jobs with given examples.

Every worker runs it under Ray Train; the job's task (`supervised.task`) defines the loss of an example.
"""

from __future__ import annotations

from rayrlhf.runtime.progress import stops_cleanly
from rayrlhf.runtime.results import RunResult
from rayrlhf.supervised.job import SupervisedJob
from rayrlhf.supervised.setup import SupervisedRun, set_up
from rayrlhf.supervised.task import Objective, total_weight


@stops_cleanly
def supervised_worker(job: SupervisedJob) -> RunResult:
    return supervised_loop(set_up(job))


def supervised_loop(run: SupervisedRun) -> RunResult:
    """One optimizer step on each step's examples, until the last step or until `eval.patience` runs out."""
    task, ranks = run.task, run.ranks
    run.restore()
    run.prepare_reference()
    run.evaluate("before")
    for step, micro_batches in run.steps():
        with run.progress.phase("update"):
            batches = task.prepare(micro_batches, "train")  # pack, add outputs of reference or teacher
            objective = Objective(task, total_weight(task, batches, ranks))  # over the examples of all ranks
            metrics = task.learner.update(objective.term(batches), step=step)
            packing = run.packing_metrics(micro_batches, batches)
        run.end_step(metrics, packing)
        if run.patience_exhausted():
            break
    return run.finish()
