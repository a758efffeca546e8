"""The critic in a separate trainer: a loop that answers the calls of the actor's workers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError

from rayrlhf.batch import ValueBatch, pack_values, padding_tokens
from rayrlhf.placement.reaper import NAMESPACE, register_worker
from rayrlhf.policy.actor_critic import LocalCritic, make_critic
from rayrlhf.policy.critic_channel import CHANNEL_DIED, Answer, CriticFailed, Request, Share
from rayrlhf.policy.critic_client import critic_folder
from rayrlhf.policy.job import PolicyJob
from rayrlhf.storage.folder import on_this_node, run_folder
from rayrlhf.train import collectives, manifest


def critic_loop(job: PolicyJob) -> None:
    """Answer calls until the actor's workers send "stop". Runs on every critic worker, under Ray Train."""
    w = CriticWorker(job)
    try:
        for request, share in w.requests():
            w.answer(w.run(request, share))
    except BaseException as failure:
        w.report_failure(failure)
        raise


class CriticWorker:
    """One rank of the critic."""

    def __init__(self, job: PolicyJob) -> None:
        self.config = job.config
        self.channel: Any = ray.get_actor(job.critic_channel, namespace=NAMESPACE)
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        register_worker(job.run_id, "critic", self.rank)
        torch.set_num_threads(job.threads_per_worker)
        self.critic = self._fresh()
        self.is_fresh = True
        self.started: int = collectives.gather_lists([time.time_ns()])[0]
        self._ask("join", self.world_size)

    def _fresh(self) -> LocalCritic:
        torch.manual_seed(self.config.run.seed)
        return make_critic(self.config)

    def requests(self) -> Iterator[tuple[Request, Share]]:
        """Iterate over the calls, up to and excluding "stop", which is answered here."""
        while True:
            call = self._ask("next", self.rank)
            if call is None:
                continue
            if call[0].kind == "stop":
                self.answer(Answer())
                return
            yield call

    def run(self, request: Request, share: Share) -> Answer:
        match request.kind:
            case "begin":
                if not self.is_fresh:
                    self.critic = self._fresh()
                    self.is_fresh = True
            case "values":
                return Answer(values=self._values(share))
            case "update":
                assert request.objective is not None
                self.is_fresh = False
                metrics = self.critic.update(self._batches(share), request.objective, step=request.step)
                return Answer(metrics=metrics)
            case "save":
                self._save(request.step)
            case "load":
                self.is_fresh = False
                self.critic.load(on_this_node(self.config.run, critic_folder(request.step)))
            case "offload":
                self.critic.offload()
            case "offload_weights":
                self.critic.offload_weights()
            case "reload":
                self.critic.reload()
            case "stop":
                raise AssertionError("answered by requests()")
        return Answer()

    def answer(self, answer: Answer) -> None:
        self._ask("answer", self.rank, answer)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the channel. Raises `CriticFailed` if the session is invalid."""
        try:
            return ray.get(getattr(self.channel, method).remote(self.started, *arguments))
        except ActorUnavailableError as error:
            raise CriticFailed(f"RuntimeError: {CHANNEL_DIED}") from error

    def report_failure(self, failure: BaseException) -> None:
        self.channel.fail.remote(type(failure).__name__, str(failure))

    def _values(self, share: Share) -> dict[int, ObjectRef]:
        values = self.critic.values(self._batches(share))
        return {number: ray.put(v.cpu()) for number, v in zip(share.parts, values, strict=False)}

    def _batches(self, share: Share) -> list[ValueBatch]:
        """This rank's micro-batches in the order of their numbers, then padding."""
        batches: list[ValueBatch] = ray.get([part.batch for part in share.parts.values()])
        batches += [_padding() for _ in range(share.num_batches - len(batches))]
        return [batch.to(collectives.device()) for batch in batches]

    def _save(self, step: int) -> None:
        """Save atomically. One more checkpoint is kept than of the actor, whose own is committed later."""
        name = critic_folder(step)
        folder = run_folder(self.config.run, name)
        parent = (Path(self.config.run.path) / name).parent
        own = parent / f".{folder.name}-rank-{self.rank:04d}"
        shutil.rmtree(own, ignore_errors=True)  # of workers that died
        own.mkdir(parents=True)
        self.critic.save(own)
        manifest.commit(own, folder, {"step": step})
        if self.rank > 0:
            return
        kept = self.config.checkpoint.keep + 1
        steps = [each for each in folder.parent.folders() if each.startswith("step_")]
        for old in steps[:-kept]:
            folder.parent.remove(old)


def _padding() -> ValueBatch:
    return pack_values(padding_tokens(), torch.zeros(2), torch.zeros(2))
