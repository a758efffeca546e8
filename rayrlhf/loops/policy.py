"""Online reinforcement learning with a policy: PPO and its kin. Every actor worker runs this loop, under
Ray Train.
"""

from __future__ import annotations

from typing import Any

from rayrlhf.loops.experience import add_advantages, drop_unscored, make_mini_batches
from rayrlhf.loops.job import PolicyJob
from rayrlhf.loops.objectives import StepCounts
from rayrlhf.loops.worker import PolicyWorker, stops_cleanly


@stops_cleanly
def policy_loop(arguments: dict[str, PolicyJob]) -> dict[str, Any]:
    """Sample, score, estimate advantages, update critic and actor, hand the new weights to the engines;
    repeat.
    """
    w = PolicyWorker(arguments["job"])
    w.resume()
    if w.state.step == 0:
        w.evaluate("before")
    for step, prompts in w.prompts():
        with w.timer("step"):
            with w.phase("rollout"):
                samples = w.collect(prompts)
                kept = drop_unscored(samples, w.algorithm.advantage)
                w.count_failures(samples, kept)
            with w.phase("logprobs"):
                mini_batches = make_mini_batches(
                    kept,
                    num_mini_batches=w.algorithm.mini_batches,
                    budget_tokens=w.config.train.max_tokens_per_micro_batch,
                    seed=w.config.run.seed,
                    step=step,
                )
                mini_batches = w.with_inferences(mini_batches)
                mini_batches = w.per_mini_batch(
                    mini_batches, lambda batches: add_advantages(batches, w.algorithm, kl_coef=w.kl.coef)
                )
            for _ in range(w.algorithm.updates_per_batch):
                for batches in mini_batches:
                    counts = StepCounts.of(batches)
                    with w.phase("update_critic"):
                        w.metrics |= w.critic.update(batches, counts, step=step)
                    with w.phase("update_actor"):
                        w.metrics |= w.update_actor(batches, counts, step=step)
            w.state.step = step + 1
            with w.phase("weight_sync"):
                w.sync.push(w.actor_parameters(), version=w.state.step)
            w.adapt_kl(num_samples=len(samples))
        w.report(samples, kept, mini_batches)
        if w.is_due(w.config.eval.every_steps) and not w.is_last():
            w.evaluate("during")
        if w.is_due(w.config.checkpoint.every_steps) or w.is_last():
            w.save()
    return w.finish()
