"""Learning from samples that are given: SFT, reward models, preferences, distillation. Every worker runs this
loop, under Ray Train; what is learnt is the job's task (`rayrlhf.supervised.task`).
"""

from __future__ import annotations

from typing import Any

from rayrlhf.runtime.worker import stops_cleanly
from rayrlhf.supervised.job import SupervisedJob
from rayrlhf.supervised.worker import SupervisedWorker


@stops_cleanly
def supervised_loop(arguments: dict[str, SupervisedJob]) -> dict[str, Any]:
    """Take the next step's samples, learn from them; repeat until the data or the patience end."""
    w = SupervisedWorker(arguments["job"])
    w.resume()
    w.ask_reference()
    w.evaluate_before()
    for step, micro_batches in w.steps():
        with w.phase("update"):
            w.learn(micro_batches, step)
        w.end_step()
        if w.has_lost_patience():
            break
    return w.finish()
