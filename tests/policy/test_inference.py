"""The passes before a step's updates: which models compute at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rayrlhf.batch import pack_samples
from rayrlhf.policy.actor_critic import Ref, infer
from rayrlhf.samples import Prompt, Sample

DEADLINE_SECONDS = 20.0


class Steps:
    """What the reference and the actor do, one after the other's signal."""

    def __init__(self) -> None:
        self.asked, self.actor_is_done = threading.Event(), threading.Event()
        self.overlapped = False


class SlowReference:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def logprobs(self, batches: Any, temperature: float) -> Any:
        self.steps.asked.set()
        self.steps.overlapped = self.steps.actor_is_done.wait(DEADLINE_SECONDS)
        return [torch.full_like(batch.loss_mask, -temperature) for batch in batches]


class Actor:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def logprobs(self, batches: Any) -> Any:
        assert self.steps.asked.wait(DEADLINE_SECONDS), "the reference was not asked before"
        self.steps.actor_is_done.set()
        return [torch.full_like(batch.loss_mask, -1.0) for batch in batches]


def test_a_served_reference_computes_while_the_actor_does() -> None:
    prompt = Prompt(row_id=3, prompt_ids=[1, 12, 9], prompt="<s>2+2=")
    batch = pack_samples(
        [Sample(7, 0, prompt, [28, 2], "4", [-0.1, -0.2], [1, 1], [41, 41], False, score=1.0)]
    )
    steps = Steps()
    actor: Any = Actor(steps)
    with ThreadPoolExecutor(1) as thread:
        [[inferred]] = infer([[batch]], actor, Ref(SlowReference(steps), 0.5, thread), None)
    assert steps.overlapped
    assert inferred.old_logprobs is not None and inferred.old_logprobs.tolist() == [-1.0] * 5
    assert inferred.ref_logprobs is not None and inferred.ref_logprobs.tolist() == [-0.5] * 5
    assert inferred.values is None
