"""The critic as the policy loop sees it when it has a trainer of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError
from torch import Tensor

from rayrlhf.batch import PackedBatch
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.policy.critic_channel import MAILBOX_DIED, Answer, CriticFailed, Kind, Part, Request
from rayrlhf.policy.losses import StepCounts
from rayrlhf.policy.step_metrics import UpdateMetrics
from rayrlhf.train import collectives

SHARDS = "critic"  # folder of the run, beside the actor's checkpoints
STEP_FILE = "critic.json"  # in the actor's checkpoint: which of the critic's own belongs to it


def critic_folder(config: PolicyRunConfig, step: int) -> Path:
    """Of the critic's own shards."""
    return Path(config.run.path) / SHARDS / f"step_{step:06d}"


class RemoteCritic:
    """The actor workers' end of the mailbox; every method is collective over them."""

    def __init__(self, mailbox: Any, *, timeout_seconds: float, start_timeout_seconds: float) -> None:
        self.mailbox = mailbox
        self.timeout_seconds = timeout_seconds
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.started: int = collectives.gather_lists([time.time_ns()])[0]  # rank 0's, for all
        self.num_calls = 0
        self.step = 0
        # A critic that has learnt something from workers before us starts anew.
        self._wait(self._post("begin"), "begin", start_timeout_seconds)

    def start_values(self, batches: Sequence[PackedBatch]) -> Callable[[], list[Tensor]]:
        ref = self._post("values", batches=batches)

        def values() -> list[Tensor]:
            answer = self._wait(ref, "values")
            return [answer.values[i].to(batch.loss_mask.device) for i, batch in enumerate(batches)]

        return values

    def start_update(
        self, batches: list[PackedBatch], counts: StepCounts, *, step: int
    ) -> Callable[[], UpdateMetrics]:
        ref = self._post("update", step=step, counts=counts, batches=batches)
        return lambda: self._wait(ref, "update").metrics

    def finish_step(self, step: int) -> None:
        self.step = step + 1

    def offload(self) -> None:
        self._wait(self._post("offload"), "offload")

    def reload(self) -> None:
        self._wait(self._post("reload"), "reload")

    def save(self, folder: Path) -> None:
        """The critic writes its shards to a folder of its own; the checkpoint says which."""
        self._wait(self._post("save", step=self.step), "save")
        if self.rank == 0:
            (folder / STEP_FILE).write_text(json.dumps({"step": self.step}))

    def load(self, folder: Path) -> None:
        self.step = json.loads((folder / STEP_FILE).read_text())["step"]
        self._wait(self._post("load", step=self.step), "load")

    def close(self) -> None:
        self._wait(self._post("stop"), "stop")

    def _post(
        self,
        kind: Kind,
        *,
        step: int = 0,
        counts: StepCounts | None = None,
        batches: Sequence[PackedBatch] = (),
    ) -> Any:
        parts = [Part(ray.put(_for_critic(batch)), batch.num_tokens) for batch in batches]
        number, self.num_calls = self.num_calls, self.num_calls + 1
        request = Request(kind, step, counts)
        return self.mailbox.ask.remote(self.started, self.world_size, number, self.rank, request, parts)

    def _wait(self, ref: Any, kind: Kind, timeout_seconds: float | None = None) -> Answer:
        seconds = timeout_seconds or self.timeout_seconds
        try:
            return ray.get(ref, timeout=seconds)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"the critic's trainer did not answer {kind!r} within {seconds:g} s (it runs beside the "
                "actor's; train.collective_timeout_seconds is its deadline)"
            ) from error
        except ActorUnavailableError as error:
            raise CriticFailed(f"RuntimeError: {MAILBOX_DIED}") from error
        except CriticFailed as failure:
            kind_of_failure, _, text = str(failure.args[0] if failure.args else failure).partition(": ")
            if kind_of_failure == FloatingPointError.__name__:
                raise FloatingPointError(text) from failure  # a restart would only repeat it
            raise


def _for_critic(batch: PackedBatch) -> PackedBatch:
    """What a critic reads of a micro-batch, on the CPU."""
    read = PackedBatch(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
    if batch.values is not None and batch.returns is not None:
        read = read.with_fields(values=batch.values, returns=batch.returns)
    return read.to("cpu")
