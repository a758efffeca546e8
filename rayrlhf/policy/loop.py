"""Online reinforcement learning with a policy: PPO and its kin. Every actor worker runs this loop, under
Ray Train.
"""

from __future__ import annotations

from typing import Any

from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.setup import PolicyWorker
from rayrlhf.runtime.worker import stops_cleanly


@stops_cleanly
def policy_loop(arguments: dict[str, PolicyJob]) -> dict[str, Any]:
    """Sample, score, learn from it, hand the new weights to the engines; repeat."""
    w = PolicyWorker(arguments["job"])
    w.resume()
    w.evaluate_before()
    for step in w.steps():
        with w.phase("rollout"):
            samples = w.enough_groups(w.collect_draw)
        w.learn(samples, step)
        with w.phase("weight_sync"):
            w.push_weights(version=step + 1)
        w.end_step()
    return w.finish()
