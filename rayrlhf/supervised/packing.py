"""Packing on the workers, where what is packed is only known there."""

from __future__ import annotations

from collections.abc import Sequence

from rayrlhf.batch import PackedBatch, empty_examples, pack_examples
from rayrlhf.data.packing import micro_batches
from rayrlhf.samples import Example
from rayrlhf.train import collectives


def pack_evenly(examples: Sequence[Example], budget_tokens: int) -> list[PackedBatch]:
    """This rank's examples, of one sequence each, as packed micro-batches on its device; equally many, and at
    least one, on every rank. Collective.
    """
    packs = micro_batches([example.num_tokens for example in examples], budget_tokens)
    batches = [pack_examples([examples[i] for i in pack]) for pack in packs]
    wanted = max(1, int(collectives.max_over_ranks(len(batches))))
    batches += [empty_examples(1)] * (wanted - len(batches))
    return [batch.to(collectives.device()) for batch in batches]
