"""Requests to engines that answer, die and time out, with a plain Python fake of Serve's handle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayrlhf.config.rollout import RolloutConfig, SamplingConfig
from rayrlhf.data.ends import ResponseEnds
from rayrlhf.rollout import client as client_module
from rayrlhf.rollout.client import MAX_ENGINE_DEATHS, RolloutClient, sample_seed, vllm_params
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.failures import EngineDied
from rayrlhf.samples import Sample
from tests.samples import make_prompt

PROMPT = make_prompt([5, 6])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_SECONDS", 0.0)


class Engines:
    """Raises the given failures first, one per request (None: never answers), then generates.

    A failure `(n, error)` comes after n finished generations.
    """

    def __init__(self, *failures: Exception | tuple[int, Exception] | None) -> None:
        self.failures = list(failures)
        self.requests: list[tuple[list[int], list[dict[str, Any]], int]] = []
        self.num_cancelled = 0
        self.generate = self

    def options(self, *, stream: bool) -> Engines:
        assert stream
        return self

    def remote(
        self, prompt_ids: list[int], params: list[dict[str, Any]], min_version: int, images: Any
    ) -> Any:
        self.requests.append((prompt_ids, params, min_version))
        self.images = images
        return Answer(self, params, min_version)


class Answer:
    """Serve's response generator: async iteration and `cancel`."""

    def __init__(self, engines: Engines, params: list[dict[str, Any]], min_version: int) -> None:
        self.engines = engines
        self.iterator: Any = self._generate(params, min_version)

    def cancel(self) -> None:
        self.engines.num_cancelled += 1

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await anext(self.iterator)

    async def _generate(self, params: list[dict[str, Any]], min_version: int) -> Any:
        after, failure = 0, False
        if self.engines.failures:
            failure = self.engines.failures.pop(0)
            if isinstance(failure, tuple):
                after, failure = failure
        for i in reversed(range(len(params))):  # the last request finishes first
            if failure is not False and len(params) - 1 - i == after:
                if failure is None:
                    await asyncio.Event().wait()
                else:
                    assert isinstance(failure, Exception)
                    raise failure
            versions = [min_version + 1] * 2
            seed = params[i]["seed"]
            yield i, Generation([seed, 11], f"text {seed}", [-0.5, -1.0], i == 1, versions)


def in_task(cause: Exception) -> RayTaskError:
    """How Ray raises the error of a remote method: an exception of both types."""
    return RayTaskError("generate", "Traceback …", cause).as_instanceof_cause()


def make_client(engines: Engines, timeout_seconds: float = 60.0) -> RolloutClient:
    config = RolloutConfig(timeout_seconds=timeout_seconds)
    return RolloutClient(engines, config, seed=3, ends_of=lambda stop: ResponseEnds((), tuple(stop)))


def ask(client: RolloutClient, group_size: int = 2) -> list[Sample]:
    async def samples() -> list[Sample]:
        stream = client.samples(
            PROMPT,
            group_id=7,
            group_size=group_size,
            min_version=4,
            sampling=SamplingConfig(max_new_tokens=9),
        )
        return [sample async for sample in stream]

    return asyncio.run(samples())


def test_a_group_of_samples() -> None:
    engines = Engines()
    client = make_client(engines)
    second, first = ask(client)  # in the order they finished
    seed = sample_seed(3, 7, 0)
    assert first == Sample(
        group_id=7,
        sample_index=0,
        prompt=PROMPT,
        response_ids=[seed, 11],
        response=f"text {seed}",
        rollout_logprobs=[-0.5, -1.0],
        loss_mask=[1, 1],
        policy_versions=[5, 5],  # the engine's, not `min_version`
        truncated=False,
    )
    assert (second.sample_index, second.truncated) == (1, True)
    [(prompt_ids, params, min_version)] = engines.requests
    assert (prompt_ids, min_version, client.retries) == ([5, 6], 4, 0)
    assert [p["seed"] for p in params] == [sample_seed(3, 7, 0), sample_seed(3, 7, 1)]
    assert {p["max_tokens"] for p in params} == {9}


def test_finished_generations_are_not_requested_again() -> None:
    engines = Engines((2, RayActorError()))
    client = make_client(engines)
    samples = ask(client, group_size=4)
    assert sorted(s.sample_index for s in samples) == [0, 1, 2, 3]
    assert all(s.response_ids[0] == sample_seed(3, 7, s.sample_index) for s in samples)
    whole, rest = (request[1] for request in engines.requests)
    assert rest == whole[:2], "the first two were not finished"


def test_leaving_the_iteration_cancels_the_rest() -> None:
    engines = Engines()

    async def first_only() -> None:
        client = make_client(engines)
        stream: Any = client.samples(
            PROMPT, group_id=7, group_size=3, min_version=0, sampling=SamplingConfig()
        )
        await anext(stream)
        await stream.aclose()

    asyncio.run(first_only())
    assert engines.num_cancelled == 1


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


def test_a_request_that_kills_engines_is_not_retried_forever() -> None:
    deaths = [in_task(EngineDied("CUDA error")) for _ in range(MAX_ENGINE_DEATHS)]
    assert len(ask(make_client(Engines(*deaths)))) == 2
    engines = Engines(*deaths, in_task(EngineDied("CUDA error")))
    with pytest.raises(EngineDied):
        ask(make_client(engines))
    assert len(engines.requests) == MAX_ENGINE_DEATHS + 1


@pytest.mark.parametrize(
    "cause", [ValueError("prompt is too long"), TimeoutError("the engine's own deadline")]
)
def test_an_error_of_the_request_itself_is_not_retried(cause: Exception) -> None:
    engines = Engines(in_task(cause))
    with pytest.raises(type(cause)):
        ask(make_client(engines))
    assert len(engines.requests) == 1


def test_the_deadline_of_an_engine_that_does_not_answer() -> None:
    with pytest.raises(TimeoutError, match=r"^no engine answered within rollout.timeout_seconds=0.02$"):
        ask(make_client(Engines(None), timeout_seconds=0.02))


def test_the_deadline_covers_all_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RayActorError()
    clock = SimpleNamespace(now=0.0)

    class SlowToFail(Engines):
        def remote(self, *request: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            clock.now += 3.0
            return super().remote(*request)

    # Only the client's clock: asyncio keeps its own.
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
    assert vllm_params(sampling, ResponseEnds((7, 9), ("\n\n",)), seed=11) == {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_tokens": 2,
        "max_tokens": 64,
        "stop": ["\n\n"],
        "stop_token_ids": [7, 9],
        "seed": 11,
        "logprobs": 0,
    }
    unlimited = vllm_params(SamplingConfig(), ResponseEnds(), seed=11)
    assert unlimited["stop"] is None and unlimited["stop_token_ids"] is None


@pytest.mark.parametrize("temperature, sent", [(0.0, 0.0), (1e-7, 0.0), (1e-3, 1e-3), (1.0, 1.0)])
def test_tiny_temperatures_are_greedy(temperature: float, sent: float) -> None:
    assert vllm_params(SamplingConfig(temperature=temperature), ResponseEnds(), seed=0)["temperature"] == sent


SeedOf = Callable[[int], int]


@pytest.mark.parametrize(
    "seed_of",
    [lambda i: sample_seed(i, 0, 0), lambda i: sample_seed(0, i, 0), lambda i: sample_seed(0, 0, i)],
    ids=["run", "group", "sample"],
)
def test_seeds_depend_on_every_index(seed_of: SeedOf) -> None:
    seeds = [seed_of(i) for i in range(500)]
    assert len(set(seeds)) == 500
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    assert seeds == [seed_of(i) for i in range(500)]


def test_seeds_of_a_run_are_distinct() -> None:
    indices = [(group, sample) for group in range(200) for sample in range(10)]
    evaluation = [(2**40 + group, 0) for group in range(100)]
    seeds = {sample_seed(0, *index) for index in [*indices, *evaluation]}
    assert len(seeds) == len(indices) + len(evaluation)
