"""The policy loop with rollouts that run ahead: engines sample for later steps while the workers train.

What differs from `policy.loop`: samples come from a pool of groups in flight, started up to
`rollout.max_staleness` versions ago. Weights arrive in the middle of their responses; engines pause, keep the
tokens they have, and go on, so a sample may carry several policy versions. With `max_staleness: 0` nothing is
in flight while the workers train, and the numbers are those of the synchronous loop.
"""

from __future__ import annotations

from typing import Any

from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.setup import PolicyWorker
from rayrlhf.runtime.worker import stops_cleanly


@stops_cleanly
def async_policy_loop(arguments: dict[str, PolicyJob]) -> dict[str, Any]:
    """Keep rollouts in flight, learn from the oldest, hand the new weights to the engines; repeat."""
    w = PolicyWorker(arguments["job"])
    w.resume()
    w.evaluate_before()
    w.start_rollouts_ahead()
    for step in w.steps():
        with w.phase("rollout"):
            samples = w.enough_groups(w.take_draw)
        w.learn(samples, step)
        with w.phase("weight_sync"):
            w.push_weights(version=step + 1)
        w.end_step()
    return w.finish()
