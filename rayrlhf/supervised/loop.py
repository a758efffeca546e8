"""SFT, reward models, DPO, KTO and distillation: one loop for every job that is trained on given examples.

Every worker runs it, under Ray Train; what an example's loss is, is the job's task (`supervised.task`).
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
    """Take the next step's examples, one optimizer step on them; until the data or `eval.patience` end."""
    task, ranks = run.task, run.ranks
    run.restore()
    run.ask_reference()
    run.evaluate("before")
    for step, micro_batches in run.steps():
        with run.progress.phase("update"):
            batches = task.prepare(micro_batches, "train")  # pack, add what reference or teacher say
            objective = Objective(task, total_weight(task, batches, ranks))  # of the examples of all ranks
            metrics = task.learner.update(objective.term(batches), step=step)
            packing = run.packing_metrics(micro_batches)
        run.end_step(metrics, packing)
        if run.has_lost_patience():
            break
    return run.finish()
