"""The training loop of PPO, GRPO and related algorithms, run by every actor worker under Ray Train."""

from __future__ import annotations

from rayrlhf.algorithms.metrics import Metrics, Sum
from rayrlhf.policy.actor_critic import Pending, infer
from rayrlhf.policy.batches import balance_and_pack, with_group_advantages, with_token_advantages
from rayrlhf.policy.job import PolicyJob
from rayrlhf.policy.losses import PolicyObjective, ValueObjective, loss_counts
from rayrlhf.policy.rollouts import collect_groups
from rayrlhf.policy.run_state import Run
from rayrlhf.policy.setup import set_up
from rayrlhf.runtime.progress import stops_cleanly
from rayrlhf.runtime.results import RunResult


@stops_cleanly
def policy_worker(job: PolicyJob) -> RunResult:
    return policy_loop(set_up(job))


def policy_loop(run: Run) -> RunResult:
    """Sample groups and score them, estimate advantages, update critic and actor, push the weights; repeat.

    Synchronous and asynchronous runs differ only in `run.rollouts`, the source of groups. Every rank has its
    share of a step's samples; losses, advantages and metrics are over all ranks.
    """
    algorithm, ranks, phase = run.config.algorithm, run.ranks, run.progress.phase
    run.restore()
    run.evaluate("before")
    for step in run.steps():
        with phase("rollout"):  # prompts -> responses -> rewards -> scores, in whole groups
            groups = collect_groups(
                run.rollouts, run.rewards, algorithm, ranks, step=step, num_groups=run.groups_per_step
            )
            samples = with_group_advantages(groups.samples, algorithm.advantage)
        texts = run.texts.next() if run.texts is not None else None  # PPO-ptx
        metrics = Metrics({"data/empty_mini_batches": Sum(0.0)})
        critic_updates: list[Pending[Metrics]] = []
        if groups.num_groups > 0:
            run.start_training()  # colocated engines sleep from here on
            with phase("logprobs"):
                mini_batches, balance = balance_and_pack(samples, run.packing, ranks, step=step)
                mini_batches = infer(mini_batches, run.old_actor, run.ref, run.critic)
                mini_batches = with_token_advantages(mini_batches, algorithm, ranks, kl_coef=run.kl.coef)
            for mini_batch in mini_batches * algorithm.updates_per_batch:
                counts = loss_counts(mini_batch, ranks)
                if counts.tokens == 0:  # AdamW would still update the weights, from its moments
                    metrics += Metrics({"data/empty_mini_batches": Sum(1.0)})
                    continue
                if run.critic is not None:  # a separate one trains while the actor does, and during the push
                    with phase("update_critic"):
                        value_loss = ValueObjective(algorithm, counts, run.value_clip, run.longest_response)
                        critic_updates.append(run.critic.start_update(mini_batch, value_loss, step=step))
                if step >= algorithm.critic_warmup_steps:
                    with phase("update_actor"):
                        policy_loss = PolicyObjective(algorithm, counts, run.kl.coef, run.longest_response)
                        metrics += run.actor.update(mini_batch, policy_loss, texts, step=step)
            run.end_training(metrics, samples, balance, step=step)
        with phase("weight_sync"):
            run.push_weights(version=step + 1)
        if critic_updates:
            with phase("update_critic"):
                for update in critic_updates:
                    metrics += update.result()
        run.end_step(groups, samples, metrics)
    return run.finish()
