"""In the place of vLLM's LLMEngine and its worker: no model, but vLLM's turns of memory and its requests.

The product's own `Stepper` steps it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan

from rayrlhf.weights.buckets import size_of
from rayrlhf.weights.shared_memory import device_key
from rayrlhf.weights.transfer_group import join
from tests.integration.pretend_gpu import (
    CAPACITY,
    ENGINE_CONTEXT,
    ENGINE_WEIGHTS,
    settings,
)
from tests.integration.pretend_gpu.install import give, ledger, take, this_gpu, wait_for

ENGINE = "engine"
SIZES = {"weights": ENGINE_WEIGHTS, "kv_cache": settings().engine_cache}
STEP_SECONDS = 0.05
DEVICE = torch.device("cpu")


@dataclass
class Request:
    prompt_ids: list[int]
    num_tokens: int
    number: int
    ends: float


class Engine:
    """The methods of LLMEngine that `Stepper` calls in a run of all weights."""

    @classmethod
    def from_engine_args(cls, arguments: Any, *, enable_multiprocessing: bool) -> Engine:
        return cls()

    def __init__(self) -> None:
        gpu = this_gpu()
        with ledger().measured(gpu, ENGINE, wanted=int(CAPACITY * settings().engine_share)):
            ledger().arrive("engine that measures", gpu)
            take(ENGINE, "context", ENGINE_CONTEXT)
            take(ENGINE, "weights", ENGINE_WEIGHTS)
            time.sleep(settings().start_seconds)
            wait_for(gpu, ENGINE, "trainer", "reward model")
        take(ENGINE, "kv_cache", settings().engine_cache)
        self.worker = Worker(self)
        self.requests: dict[str, Request] = {}
        self.num_requests = 0
        self.version = "default"

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, *, lora_request: None = None
    ) -> None:
        self.num_requests += 1
        assert params.max_tokens is not None
        ends = time.monotonic() + settings().request_seconds
        self.requests[request_id] = Request(
            prompt["prompt_token_ids"], params.max_tokens, self.num_requests, ends
        )

    def abort_request(self, request_ids: Sequence[str]) -> None:
        aborted = [self.requests.pop(each) for each in request_ids if each in self.requests]
        if any(request.ends == math.inf for request in aborted):
            ledger().note(this_gpu(), ENGINE, "aborted endless requests")

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[RequestOutput]:
        time.sleep(STEP_SECONDS)
        if self.requests and self.worker.released:
            self.worker.problem(f"computes without its {' and '.join(sorted(self.worker.released))}")
        if self.requests and settings().endless.exists():
            for request in self.requests.values():
                request.ends = math.inf
            ledger().arrive("endless request", this_gpu())
        done = [each for each, request in self.requests.items() if request.ends <= time.monotonic()]
        return [self._output(each, self.requests.pop(each)) for each in done]

    def _output(self, request_id: str, request: Request) -> RequestOutput:
        count, variant = request.num_tokens, request.number % 2  # samples of a group differ
        completion = CompletionOutput(
            index=0,
            text="a" * (1 + variant),
            token_ids=[7 + variant] * count,
            cumulative_logprob=None,
            logprobs=SimpleNamespace(logprobs=[-5.0] * count),  # pyright: ignore[reportArgumentType]
            finish_reason="length",
            weight_versions=[WeightVersionSpan(self.version, 0, count)],
        )
        return RequestOutput(request_id, None, request.prompt_ids, None, [completion], finished=True)

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> None:
        pass

    def set_weight_version(self, version: str) -> None:
        self.version = version


class Worker:
    """The methods of vLLM's worker, and of `WorkerExtension`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.released: set[str] = set()
        self.link: Any = None

    def problem(self, what: str) -> None:
        ledger().problem(this_gpu(), f"{ENGINE} {what}")

    def release_memory(self) -> int:
        if self.engine.requests:
            self.problem(f"releases its memory while {len(self.engine.requests)} requests run")
        self.released = set(SIZES)
        return sum(give(ENGINE, what) for what in SIZES)

    def reacquire_memory(self, part: str) -> None:
        take(ENGINE, part, SIZES[part])
        self.released.remove(part)

    def device_key(self) -> str:
        return device_key(DEVICE)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        rank = init_info["first_rank"]
        self.link = join(init_info["transfer_group"], rank=rank, device=DEVICE, key=self.device_key())

    def leave_transfer_group(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.end("left")

    def record_arrivals(self, *, verify: bool) -> None:
        pass

    def start_weight_update(self) -> None:
        if "weights" in self.released:
            self.problem("loads weights without their memory")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info["bucket"] is None:
            self.link.receive(size_of(update_info["slices"]))
            self.link.release()

    def finish_weight_update(self) -> None:
        pass
