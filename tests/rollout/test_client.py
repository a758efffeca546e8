"""Requests to engines that answer, die and time out; a handle of plain Python stands in for Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayrlhf.batch import Sample
from rayrlhf.config.rollout import RolloutConfig, SamplingConfig
from rayrlhf.rollout import client as client_module
from rayrlhf.rollout.client import MAX_ENGINE_DEATHS, RolloutClient, sample_seed, vllm_params
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.failures import EngineDied
from tests.samples import make_prompt

PROMPT = make_prompt([5, 6])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_SECONDS", 0.0)


class Engines:
    """Raises the given failures first, one per request (None: never answers), then generates."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.requests: list[tuple[list[int], list[dict[str, Any]], int]] = []
        self.generate = self

    def remote(self, prompt_ids: list[int], params: list[dict[str, Any]], min_version: int) -> Any:
        self.requests.append((prompt_ids, params, min_version))

        async def answered() -> list[Generation]:
            if self.failures:
                failure = self.failures.pop(0)
                if failure is None:
                    await asyncio.Event().wait()
                else:
                    raise failure
            return [
                Generation(
                    [10 + i, 11], f"text {i}", [-0.5, -i], truncated=i == 1, policy_version=min_version + 1
                )
                for i in range(len(params))
            ]

        return answered()


def in_task(cause: Exception) -> RayTaskError:
    """As Ray raises what a remote method has raised: an error of both types."""
    return RayTaskError("generate", "Traceback …", cause).as_instanceof_cause()


def make_client(engines: Engines, timeout_seconds: float = 60.0) -> RolloutClient:
    return RolloutClient(engines, RolloutConfig(timeout_seconds=timeout_seconds), seed=3)


def ask(client: RolloutClient, group_size: int = 2) -> list[Sample]:
    return asyncio.run(
        client.group(
            PROMPT,
            group_id=7,
            group_size=group_size,
            step=4,
            min_version=4,
            sampling=SamplingConfig(max_new_tokens=9),
        )
    )


def test_a_group_of_samples() -> None:
    engines = Engines()
    client = make_client(engines)
    first, second = ask(client)
    assert first == Sample(
        group_id=7,
        sample_index=0,
        prompt=PROMPT,
        response_ids=[10, 11],
        response="text 0",
        rollout_logprobs=[-0.5, 0],
        loss_mask=[1, 1],
        policy_version=5,  # the engine's, not the one that was asked for
        truncated=False,
    )
    assert (second.sample_index, second.truncated, second.rollout_logprobs) == (1, True, [-0.5, -1])
    [(prompt_ids, params, min_version)] = engines.requests
    assert (prompt_ids, min_version, client.retries) == ([5, 6], 4, 0)
    assert [p["seed"] for p in params] == [sample_seed(3, 4, 7, 0), sample_seed(3, 4, 7, 1)]
    assert {p["max_tokens"] for p in params} == {9}


UNAVAILABLE = DeploymentUnavailableError(DeploymentID(name="rollout", app_name="run"))


@pytest.mark.parametrize(
    "failure",
    [
        RayActorError(),
        in_task(RayActorError()),
        in_task(EngineDied("out of memory")),
        in_task(RayServeException("replica is gone")),
        UNAVAILABLE,
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_lost_replica_is_survived(failure: Exception) -> None:
    engines = Engines(failure)
    client = make_client(engines)
    assert len(ask(client)) == 2
    assert client.retries == 1
    first, second = engines.requests
    assert first == second, "the same request, so the same samples"


def test_many_lost_replicas_are_survived() -> None:
    client = make_client(Engines(*[RayActorError() for _ in range(10)]))
    assert len(ask(client)) == 2 and client.retries == 10


def test_a_request_that_kills_engines_is_given_up() -> None:
    deaths = [in_task(EngineDied("CUDA error")) for _ in range(MAX_ENGINE_DEATHS)]
    assert len(ask(make_client(Engines(*deaths)))) == 2
    engines = Engines(*deaths, in_task(EngineDied("CUDA error")))
    with pytest.raises(EngineDied):
        ask(make_client(engines))
    assert len(engines.requests) == MAX_ENGINE_DEATHS + 1


@pytest.mark.parametrize(
    "cause", [ValueError("prompt is too long"), TimeoutError("the engine's own deadline")]
)
def test_an_error_of_the_request_itself_is_not_repeated(cause: Exception) -> None:
    engines = Engines(in_task(cause))
    with pytest.raises(type(cause)):
        ask(make_client(engines))
    assert len(engines.requests) == 1


def test_the_deadline_of_an_engine_that_is_silent() -> None:
    with pytest.raises(TimeoutError, match=r"^no engine answered within rollout.timeout_seconds=0.02$"):
        ask(make_client(Engines(None), timeout_seconds=0.02))


def test_the_deadline_covers_all_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RayActorError()
    clock = SimpleNamespace(now=0.0)

    class SlowToFail(Engines):
        def remote(self, prompt_ids: list[int], params: list[dict[str, Any]], min_version: int) -> Any:
            clock.now += 3.0
            return super().remote(prompt_ids, params, min_version)

    # The client's clock alone: asyncio keeps its own.
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engines = SlowToFail(*[gone] * 100)
    with pytest.raises(
        TimeoutError, match=r"^no engine came back within rollout.timeout_seconds=10$"
    ) as caught:
        ask(make_client(engines, timeout_seconds=10))
    assert caught.value.__cause__ is gone
    assert len(engines.requests) == 4  # at 0, 3, 6 and 9 s; the last fails at 12


def test_sampling_parameters_by_name() -> None:
    sampling = SamplingConfig(
        temperature=0.8, top_p=0.9, top_k=20, min_new_tokens=2, max_new_tokens=64, stop=["\n\n"]
    )
    assert vllm_params(sampling, seed=11) == {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_tokens": 2,
        "max_tokens": 64,
        "stop": ["\n\n"],
        "seed": 11,
        "logprobs": 0,
    }
    assert vllm_params(SamplingConfig(), seed=11)["stop"] is None


@pytest.mark.parametrize("temperature, sent", [(0.0, 0.0), (1e-7, 0.0), (1e-3, 1e-3), (1.0, 1.0)])
def test_temperatures_that_vllm_would_take_for_noise_are_greedy(temperature: float, sent: float) -> None:
    assert vllm_params(SamplingConfig(temperature=temperature), seed=0)["temperature"] == sent


SeedOf = Callable[[int], int]


@pytest.mark.parametrize(
    "seed_of",
    [
        lambda i: sample_seed(i, 0, 0, 0),
        lambda i: sample_seed(0, i, 0, 0),
        lambda i: sample_seed(0, 0, i, 0),
        lambda i: sample_seed(0, 0, 0, i),
    ],
    ids=["run", "step", "group", "sample"],
)
def test_seeds_depend_on_every_index(seed_of: SeedOf) -> None:
    seeds = [seed_of(i) for i in range(500)]
    assert len(set(seeds)) == 500
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    assert seeds == [seed_of(i) for i in range(500)]


def test_seeds_of_a_run_are_distinct() -> None:
    indices = [(step, group, sample) for step in range(10) for group in range(20) for sample in range(10)]
    evaluation = [(2**31, group, 0) for group in range(100)]
    seeds = {sample_seed(0, *index) for index in [*indices, *evaluation]}
    assert len(seeds) == len(indices) + len(evaluation)
