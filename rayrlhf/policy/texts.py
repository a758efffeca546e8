"""Texts that are learnt beside the policy (PPO-ptx, arXiv 2203.02155), from a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.batch import PackedBatch, empty_like_batch, pack_samples
from rayrlhf.data.packing import micro_batches
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train import collectives


class TextStream:
    """This rank's texts, step by step, as packed micro-batches; equally many on every rank."""

    def __init__(self, stream: Iterator[tuple[int, list[Prompt]]], *, budget_tokens: int) -> None:
        self.stream = stream
        self.budget_tokens = budget_tokens

    def take(self) -> list[PackedBatch]:
        """The next step's. Collective."""
        _, texts = next(self.stream)
        samples = [_whole_text(text) for text in texts]
        packs = micro_batches([sample.num_tokens for sample in samples], self.budget_tokens)
        batches = [pack_samples([samples[i] for i in pack]) for pack in packs]
        wanted = int(collectives.max_over_ranks(len(batches)))
        batches += [empty_like_batch(token_id=0)] * (wanted - len(batches))
        return [batch.to(collectives.device()) for batch in batches]


def _whole_text(text: Prompt) -> Sample:
    """Every token but the first, which nothing precedes, is to be learnt."""
    first, *rest = text.prompt_ids
    return Sample(
        group_id=text.row_id,
        sample_index=0,
        prompt=Prompt(text.row_id, [first], ""),
        response_ids=rest,
        response="",
        rollout_logprobs=[0.0] * len(rest),
        loss_mask=[1] * len(rest),
        policy_versions=[],
        truncated=False,
        score=0.0,
    )
