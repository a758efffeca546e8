"""Client of a critic in a separate trainer, for the actor's workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, ObjectLostError
from torch import Tensor

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, PolicyBatch, tokens_of
from rayrlhf.policy.actor_critic import Pending, value_batch
from rayrlhf.policy.critic_channel import CHANNEL_DIED, Answer, CriticFailed, Kind, Part, Request
from rayrlhf.policy.losses import ValueObjective
from rayrlhf.train.checkpoint import checkpoint_name
from rayrlhf.train.collectives import Ranks

SHARDS = "critic"  # in the run's folder, next to the folder of the actor's checkpoints
STEP_FILE = "critic.json"  # in the actor's checkpoint: which critic checkpoint belongs to it


def critic_folder(step: int) -> str:
    """Name of the folder, in the run's, of the critic's shards at a step."""
    return f"{SHARDS}/{checkpoint_name(step)}"


@dataclass(frozen=True)
class _Values:
    critic: RemoteCritic
    ref: Any
    batches: Sequence[PackedBatch]

    def result(self) -> list[Tensor]:
        refs = self.critic.wait(self.ref, "values").values
        try:
            values: list[Tensor] = ray.get([refs[i] for i in range(len(self.batches))])
        except ObjectLostError as error:
            raise CriticFailed("RuntimeError: a worker of the critic died with its values") from error
        return [v.to(batch.loss_mask.device) for v, batch in zip(values, self.batches, strict=True)]


@dataclass(frozen=True)
class _Update:
    critic: RemoteCritic
    ref: Any

    def result(self) -> Metrics:
        return self.critic.wait(self.ref, "update").metrics


class RemoteCritic:
    """Calls the critic through the channel. Every method is collective over the actor's workers."""

    def __init__(
        self,
        channel: Any,
        ranks: Ranks,
        *,
        steps_done: Callable[[], int],
        timeout_seconds: float,
        start_timeout_seconds: float,
    ) -> None:
        """`steps_done`: completed steps of the run, which name the critic's checkpoints."""
        self.channel = channel
        self.ranks = ranks
        self.steps_done = steps_done
        self.timeout_seconds = timeout_seconds
        self.started: int = ranks.gather([time.time_ns()])[0]  # rank 0's, for all
        self.num_calls = 0
        # A critic that earlier workers have trained is initialised again.
        self.wait(self._post("begin"), "begin", start_timeout_seconds)

    def start_values(self, batches: Sequence[PackedBatch]) -> Pending[list[Tensor]]:
        return _Values(self, self._post("values", batches=[tokens_of(batch) for batch in batches]), batches)

    def start_update(
        self, batches: Sequence[PolicyBatch], objective: ValueObjective, *, step: int
    ) -> Pending[Metrics]:
        parts = [value_batch(batch) for batch in batches]
        return _Update(self, self._post("update", step=step, objective=objective, batches=parts))

    def offload(self) -> None:
        self.wait(self._post("offload"), "offload")

    def offload_weights(self) -> None:
        self.wait(self._post("offload_weights"), "offload_weights")

    def reload(self) -> None:
        self.wait(self._post("reload"), "reload")

    def save(self, folder: Path) -> None:
        """Let the critic write its shards to a separate folder, and record its step in the checkpoint."""
        step = self.steps_done()
        self.wait(self._post("save", step=step), "save")
        if self.ranks.rank == 0:
            (folder / STEP_FILE).write_text(json.dumps({"step": step}))

    def load(self, folder: Path) -> None:
        self.wait(self._post("load", step=json.loads((folder / STEP_FILE).read_text())["step"]), "load")

    def close(self) -> None:
        self.wait(self._post("stop"), "stop")

    def _post(
        self,
        kind: Kind,
        *,
        step: int = 0,
        objective: ValueObjective | None = None,
        batches: Sequence[PackedBatch] = (),
    ) -> Any:
        parts = [Part(ray.put(batch.to("cpu")), batch.num_rows) for batch in batches]
        number, self.num_calls = self.num_calls, self.num_calls + 1
        request = Request(kind, step, objective)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        return self.channel.ask.remote(self.started, world_size, number, rank, request, parts)

    def wait(self, ref: Any, kind: Kind, timeout_seconds: float | None = None) -> Answer:
        """Wait for the critic's answer. Raises `TimeoutError`, or `CriticFailed`."""
        seconds = timeout_seconds or self.timeout_seconds
        try:
            return ray.get(ref, timeout=seconds)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"the critic's trainer did not answer {kind!r} within {seconds:g} s (it runs alongside the "
                "actor's; train.collective_timeout_seconds is its deadline)"
            ) from error
        except ActorUnavailableError as error:
            raise CriticFailed(f"RuntimeError: {CHANNEL_DIED}") from error
        except CriticFailed as failure:
            kind_of_failure, _, text = str(failure.args[0] if failure.args else failure).partition(": ")
            if kind_of_failure == FloatingPointError.__name__:
                raise FloatingPointError(text) from failure  # would recur after a restart
            raise
