"""Time of one update with and without shared prefixes (train.share_prefixes).

    .venv/bin/python -m benchmarks.prefix_sharing models/SmolLM2-135M-Instruct

GRPO on 8 prompts of 40 to 150 tokens with 4 responses of 64 tokens each, and DPO on 8 pairs of them, by one
`Learner` (fp32, ZeRO-0) in one process: one update of each to warm up, then alternating. The losses of the
warm-up, which starts from the same weights (learning rate 0), must agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_counts, sequence_sums
from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.algorithms.preference_losses import PREFERENCE_LOSSES
from rayrlhf.batch import ExampleBatch, PackedBatch, pack_examples
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.data.packing import micro_batches
from rayrlhf.models.load import load_policy
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.policy.batches import add_advantages, pack_evenly, with_group_advantages
from rayrlhf.policy.losses import PolicyObjective, loss_counts, policy_forward
from rayrlhf.samples import Example, Prompt, Sample, TokenSequence
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Learner, Term

NUM_PROMPTS, GROUP_SIZE, RESPONSE_TOKENS = 8, 4, 64
PROMPT_TOKENS = np.linspace(40, 150, NUM_PROMPTS).astype(int).tolist()
BUDGET_TOKENS = 1024
VOCABULARY = 49_152


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(10, VOCABULARY, count).tolist()

    made = []
    for group, length in enumerate(PROMPT_TOKENS):
        prompt = Prompt(group, tokens(length), "")
        made += [
            Sample(
                group_id=group,
                sample_index=index,
                prompt=prompt,
                response_ids=tokens(RESPONSE_TOKENS),
                response="",
                rollout_logprobs=[-9.0] * RESPONSE_TOKENS,
                loss_mask=[1] * RESPONSE_TOKENS,
                policy_versions=[],
                truncated=False,
                score=float(rng.normal()),
            )
            for index in range(GROUP_SIZE)
        ]
    return with_group_advantages(made, "grpo")


def grpo_term(share_prefixes: bool) -> Term:
    algorithm, ranks = AlgorithmConfig(advantage="grpo"), Ranks()
    batches, _ = pack_evenly(samples(), ranks, BUDGET_TOKENS, share_prefixes=share_prefixes)
    batches = add_advantages(batches, algorithm, ranks, kl_coef=0.0)
    objective = PolicyObjective(algorithm, loss_counts(batches, ranks), 0.0, float(RESPONSE_TOKENS))
    return Term(batches, policy_forward(1.0), objective)


def dpo_term(share_prefixes: bool) -> Term:
    made = samples()
    examples = []
    for group in range(NUM_PROMPTS):
        pair = made[group * GROUP_SIZE : group * GROUP_SIZE + 2]
        sequences = tuple(
            TokenSequence(
                sample.prompt.prompt_ids + sample.response_ids,
                [0] * len(sample.prompt.prompt_ids) + sample.loss_mask,
            )
            for sample in pair
        )
        examples.append(Example(group, sequences))
    packs = micro_batches([example.num_tokens for example in examples], BUDGET_TOKENS)
    batches = [pack_examples([examples[i] for i in pack], share_prefixes=share_prefixes) for pack in packs]

    def loss(output: TokenLogprobs, batch: ExampleBatch) -> tuple[Tensor, Metrics]:
        sums = sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens).view(-1, 2)
        counts = sequence_counts(batch.loss_mask, batch.cu_seqlens).view(-1, 2)
        ref = torch.full_like(sums, -9.0 * RESPONSE_TOKENS)
        per_pair, _ = PREFERENCE_LOSSES["dpo"](
            *sums.unbind(-1), *ref.unbind(-1), *counts.unbind(-1), beta=0.1, label_smoothing=0.0, gamma=0.0
        )
        return per_pair.sum() / NUM_PROMPTS, Metrics()

    return Term(batches, policy_forward(1.0), loss)


def rows(batches: Sequence[PackedBatch]) -> tuple[int, int]:
    return sum(batch.num_tokens for batch in batches), sum(batch.num_rows for batch in batches)


def compare(name: str, learner: Learner, term: Callable[[bool], Term], rounds: int) -> None:
    terms: dict[bool, Any] = {share: term(share) for share in (False, True)}
    results = {share: learner.update(terms[share], step=0).results() for share in terms}
    for key in ("loss/actor", "loss/actor_grad_norm"):
        print(f"{name}: {key} {results[False][key]:.8g} without and {results[True][key]:.8g} with sharing")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for share, taken in seconds.items():
            start = time.perf_counter()
            learner.update(terms[share], step=0)
            taken.append(time.perf_counter() - start)
            print(f"{name}: {taken[-1]:.2f} s {'with' if share else 'without'} sharing", flush=True)
    without, with_ = (statistics.median(seconds[share]) for share in (False, True))
    num_tokens, num_rows = rows(terms[True].batches)
    print(
        f"{name}: {num_tokens} tokens in {len(terms[False].batches)} micro-batches took {without:.2f} s, "
        f"{num_rows} rows in {len(terms[True].batches)} took {with_:.2f} s: {without / with_:.2f} times "
        f"faster ({num_tokens / num_rows:.2f} times fewer rows); all: {seconds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of one update with and without shared prefixes.")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--objective", choices=["GRPO", "DPO"], help="only this one")
    options = parser.parse_args()
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29541",
    }
    dist.init_process_group("gloo", rank=0, world_size=1)
    model = ModelConfig(path=options.model, dtype="float32")
    policy = load_policy(model, options.model, device=torch.device("cpu"), chunk_tokens=256)
    train = TrainConfig(num_steps=10, zero_stage=0)
    learner = Learner(policy, train, lr=0.0, dtype=torch.float32, name="actor")
    for name, term in {"GRPO": grpo_term, "DPO": dpo_term}.items():
        if options.objective in (None, name):
            compare(name, learner, term, options.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
