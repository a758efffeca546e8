"""Weights reach every engine, and an engine that was down comes back with the newest."""

from __future__ import annotations

import functools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import adapter_matrices, adapter_weights
from rayrlhf.models.checkpoint_tensors import CheckpointTensors, checkpoint_tensors
from rayrlhf.models.lora import add_adapters
from rayrlhf.placement.plan import plan_placement
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.serve_status import app_statuses
from rayrlhf.placement.slots import create_slots
from rayrlhf.policy.apps import max_model_tokens
from rayrlhf.policy.job import PolicyJob
from rayrlhf.rollout.engine import rollout_deployment
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.runtime.ray_session import deploy, watched
from rayrlhf.weights.store import WeightStore
from rayrlhf.weights.sync import PushDiffers, WeightSync
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

NUM_ENGINES = 2
PROMPT = [1, *range(20, 90)]  # long enough to leave whole blocks in the prefix cache
NEW_TOKENS = 24
KV_CACHE_BYTES = 64 * 2**20  # policy_runs
GREEDY = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}


class Engines:
    """Two engines behind Serve, and the trainer's model, trained as a whole or with adapters alone."""

    def __init__(self, folder: Path, model: str, route: Any, lora: LoraConfig | None = None) -> None:
        config = tiny_run(
            folder,
            model,
            rollout={"num_engines": NUM_ENGINES, "sampling": {"max_new_tokens": 400}},
            data={"max_prompt_tokens": 100},
            placement={"preset": "disaggregated", "cpus_per_slot": 0.5},
        )
        self.job = PolicyJob(config, f"sync-{os.getpid()}", (), 0, 1)
        slots = create_slots(plan_placement(config), gpus_per_slot=0, run_id="sync", timeout_seconds=60)
        self.slots = replace(slots, memory_turns=self.job.weight_store)
        self.hub: Any = (
            ray.remote(WeightStore)
            .options(name=self.job.weight_store, namespace=NAMESPACE, num_cpus=0)
            .remote()
        )
        settings = engine_settings(
            config.model,
            config.rollout,
            seed=config.run.seed,
            max_model_tokens=max_model_tokens(config),
            weight_store=self.job.weight_store,
            on_gpu=False,
            threads=1,
            adapter=lora,
        )
        app = rollout_deployment(settings, self.slots, num_engines=NUM_ENGINES, max_requests=64)
        deploy({self.job.rollout_app: app})
        with watched(
            [self.job.rollout_app], timeout_seconds=120, say=print, failed=print, give_up=lambda: None
        ):
            while app_statuses()[self.job.rollout_app].app_status.status != "RUNNING":
                time.sleep(0.2)
        self.handle = serve.get_app_handle(self.job.rollout_app)
        self.route = route
        self.sync = WeightSync(
            self.hub,
            self.handle,
            route=route,
            rank=0,
            device=torch.device("cpu"),
            num_engines=NUM_ENGINES,
            bucket_bytes=100_000,  # several buckets, and parameters larger than one
            timeout_seconds=60,
            start_timeout_seconds=120,
            gathered=lambda _: nullcontext(),
            gather=lambda items: items,
            partitioned=False,
        )
        self.version = 0
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.lora = lora
        if lora is not None:
            add_adapters(self.model, lora, seed=0)

    def change_weights(self) -> str | None:
        self.version += 1
        torch.manual_seed(self.version)
        with torch.no_grad():
            if self.lora is not None:
                for _, parameter in adapter_weights(self.model):
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            else:
                self.change_parameters()
        return self.push()

    def change_parameters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" not in name:
                    parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.5)

    def push(self, *, with_base: bool = False) -> str | None:
        if self.lora is None:
            return self.sync.push(checkpoint_tensors(self.model), self.version)
        base = checkpoint_tensors(self.model, adapters=False) if with_base else None
        return self.sync.push_adapter(
            adapter_matrices(self.model), self.version, rank=self.lora.rank, dtype=torch.float32, base=base
        )

    def kill_one(self) -> int:
        victim: int = self.describe()[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        return victim

    def ask_all(self) -> list[Any]:
        return self.handle.broadcast("complete", PROMPT, GREEDY, self.version).results(timeout_s=60)

    def ask_one(self, version: int | None = None) -> Any:
        wanted = self.version if version is None else version
        return self.handle.complete.remote(PROMPT, GREEDY, wanted).result(timeout_s=60)

    def describe(self) -> list[dict[str, Any]]:
        """Those that answer."""
        answers = self.handle.broadcast("describe").results(timeout_s=30, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, dict)]

    def wait_until_all_run(self, *, without: int | None = None) -> list[dict[str, Any]]:
        """Descriptions of all engines, once none of them runs in the process `without`."""
        answers: list[dict[str, Any]] = []
        deadline = time.monotonic() + 180  # an engine starts in 20 s on an idle machine
        while time.monotonic() < deadline:
            answers = [answer for answer in self.describe() if answer["pid"] != without]
            if len(answers) == NUM_ENGINES:
                return answers
            time.sleep(0.5)
        raise AssertionError(f"only {answers} run")

    def expected(self, after: list[int] = PROMPT, count: int = NEW_TOKENS) -> list[int]:
        """Greedy continuation by plain transformers."""
        ids = list(after)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(after) :]

    def close(self) -> None:
        self.sync.close()
        serve.delete(self.job.rollout_app)
        self.slots.remove()
        ray.kill(self.hub)


@pytest.fixture(
    scope="module",
    params=[
        "gloo",
        pytest.param("object_store", marks=pytest.mark.long),
        pytest.param("ipc", marks=pytest.mark.long),
    ],
)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: str):
    request.getfixturevalue("ray_session")
    running = Engines(tmp_path_factory.mktemp("sync"), tiny_model, request.param)
    yield running
    running.close()


@pytest.fixture
def engines(started: Engines) -> Engines:
    """All up, with whatever version the test before has left."""
    started.wait_until_all_run()
    return started


def test_every_engine_serves_the_newest_weights_even_after_it_was_killed(engines: Engines) -> None:
    assert [a.token_ids for a in engines.ask_all()] == [engines.expected()] * NUM_ENGINES
    old = engines.expected()

    assert engines.change_weights() is None
    assert engines.expected() != old, "the new weights must answer differently for this test to mean anything"
    answers = engines.ask_all()  # the same prompt again: a stale prefix cache would show
    assert [a.token_ids for a in answers] == [engines.expected()] * NUM_ENGINES
    assert {v for a in answers for v in a.policy_versions} == {engines.version}

    victim = engines.kill_one()
    engines.change_weights()  # while one replica is down
    engines.wait_until_all_run(without=victim)
    answers = engines.ask_all()
    assert {d["version"] for d in engines.describe()} == {engines.version}, "it must have the newest weights"
    assert [a.token_ids for a in answers] == [engines.expected()] * NUM_ENGINES
    assert {v for a in answers for v in a.policy_versions} == {engines.version}


def test_what_a_push_has_delivered_is_published_for_an_engine_that_asks(engines: Engines) -> None:
    if engines.route == "object_store":
        pytest.skip("every push is published")
    assert engines.change_weights() is None

    def latest() -> int:
        publication: Any = ray.get(engines.hub.latest.remote(), timeout=30)
        return publication.version

    assert latest() < engines.version, "nobody needs a copy in the object store"
    victim = engines.kill_one()
    engines.wait_until_all_run(without=victim)
    assert [a.token_ids for a in engines.ask_all()] == [engines.expected()] * NUM_ENGINES
    assert latest() == engines.version

    # Trainers that have begun to change the weights have nothing to publish: the next push is awaited.
    assert engines.change_weights() is None
    engines.sync.weights_change()
    victim = engines.kill_one()
    engines.wait_until_all_run(without=victim)
    waiting = engines.handle.broadcast("complete", PROMPT, GREEDY, engines.version)
    time.sleep(3)
    assert latest() < engines.version
    assert engines.change_weights() is None
    versions = [{*answer.policy_versions} for answer in waiting.results(timeout_s=60)]
    assert {engines.version} in versions, "the engine that was started again"


def test_a_response_goes_on_with_new_weights_where_the_old_ones_stopped(engines: Engines) -> None:
    """Pause, keep, resume: no token is lost or made again, and each knows the weights that sampled it."""
    count = 300
    engines.push()  # the engines have met the trainer
    before = engines.version
    # A seed, as in training: the sampler's state must survive the pause too.
    params = GREEDY | {"max_tokens": count, "seed": 7}
    old = engines.expected(count=count)
    answers = [engines.handle.complete.remote(PROMPT, params, 0) for _ in range(6)]
    time.sleep(0.3)  # some tokens are there; whatever their number, the claim below must hold
    engines.change_weights()
    for answer in answers:
        generation = answer.result(timeout_s=60)
        versions = generation.policy_versions
        assert len(generation.token_ids) == len(versions) == count
        kept = versions.count(before)
        assert versions == [before] * kept + [engines.version] * (count - kept)
        assert generation.token_ids[:kept] == old[:kept]
        assert generation.token_ids[kept:] == engines.expected(
            PROMPT + generation.token_ids[:kept], count - kept
        )
        print(f"{kept} tokens of version {before}, {count - kept} of version {engines.version}")
        assert 0 < kept < count, "the update must arrive in the middle for this test to mean anything"


def test_an_engine_that_dies_in_a_push_holds_up_nobody(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = engines.describe()[1]
    stop = functools.partial(os.kill, victim["engine_pid"], signal.SIGSTOP)
    sender = engines.sync.direct
    if sender is None:
        stop()
    else:
        request_receive = sender._request_receive
        monkeypatch.setattr(sender, "_request_receive", lambda push: (stop(), request_receive(push))[1])
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(engines.change_weights)
        time.sleep(2)
        assert not pushing.done()
        os.kill(victim["engine_pid"], signal.SIGKILL)
        started = time.monotonic()
        problem = pushing.result(60)
    seconds = time.monotonic() - started
    print(f"{seconds:.1f} s later: {problem}")
    assert seconds < 30, "long before the deadline of 60 s"
    assert engines.ask_one().token_ids == engines.expected()
    engines.wait_until_all_run(without=victim["pid"])
    assert [a.token_ids for a in engines.ask_all()] == [engines.expected()] * NUM_ENGINES


def test_sleeping_engines_give_memory_back_and_wake_with_the_weights_they_are_given(engines: Engines) -> None:
    described = engines.describe()
    engine_pids = [d["engine_pid"] for d in described]
    before = [psutil.Process(pid).memory_info().rss for pid in engine_pids]
    engines.ask_all()
    hub_trace = functools.partial(ray.get, timeout=30)
    already = len(hub_trace(engines.hub.trace.remote()))

    # A request that nobody waits for any more, as of a trainer that died, stops no engine from sleeping.
    endless = GREEDY | {"max_tokens": 400}
    running = [engines.handle.complete.remote(PROMPT, endless, engines.version) for _ in range(40)]
    time.sleep(0.3)
    freed = engines.sync.engines_sleep()
    for request in running:
        with pytest.raises(Exception, match=r"EngineAsleep|cannot generate while the engine sleeps"):
            request.result(timeout_s=60)
    after = [psutil.Process(pid).memory_info().rss for pid in engine_pids]
    # The tied model's weights and the whole cache, of both engines; of the cache only what was written to was
    # ever resident.
    weights = sum(p.numel() * p.element_size() for p in engines.model.parameters())
    assert freed >= NUM_ENGINES * (weights + KV_CACHE_BYTES)
    assert all(now < then - 0.9 * weights for then, now in zip(before, after, strict=True))

    with pytest.raises(Exception, match="cannot generate while the engine sleeps"):
        engines.ask_one()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="cannot load weights while the engine sleeps"):
        engines.change_weights()
    assert time.monotonic() - started < 30, "long before the deadline of 60 s"
    engines.sync.engines_wake("weights")
    with pytest.raises(TimeoutError, match="cannot wake the cache before weights are pushed"):
        engines.sync.engines_wake("kv_cache")
    assert engines.change_weights() is None
    engines.sync.engines_wake("kv_cache")

    answers = engines.ask_all()
    assert [a.token_ids for a in answers] == [engines.expected()] * NUM_ENGINES
    assert {v for a in answers for v in a.policy_versions} == {engines.version}
    trace: list[Any] = hub_trace(engines.hub.trace.remote())[already:]
    for name in ("engine 0", "engine 1"):
        states = [event.what.partition(",")[0] for event in trace if event.who == name]
        assert states == ["asleep", "awake: weights", f"loaded version {engines.version}", "awake: kv_cache"]

    # One that dies in the trainers' turn comes back in the engines', with the newest weights.
    engines.sync.engines_sleep()
    os.kill(described[0]["pid"], signal.SIGKILL)
    time.sleep(5)
    assert engines.sync.engines_sleep() == 0, "nobody holds memory, and nobody starts meanwhile"
    engines.sync.engines_wake("weights")
    engines.change_weights()
    engines.sync.engines_wake("kv_cache")
    engines.wait_until_all_run(without=described[0]["pid"])
    assert [a.token_ids for a in engines.ask_all()] == [engines.expected()] * NUM_ENGINES


def test_a_version_nobody_published_is_refused(engines: Engines) -> None:
    unknown = engines.version + 7
    message = f"version {unknown} was requested, but the latest published version is {engines.version}"
    with pytest.raises(Exception, match=message):
        engines.ask_one(unknown)


class Lost(NamedTuple):
    """Tensors of which the buckets get zeros, and the verification afterwards the values."""

    group: CheckpointTensors
    reads: list[int]

    @property
    def specs(self) -> Any:
        return self.group.specs

    @property
    def parts(self) -> Any:
        return self.group.parts

    @property
    def num_bytes(self) -> int:
        return self.group.num_bytes

    def tensors(self) -> list[torch.Tensor]:
        self.reads.append(1)
        made = self.group.tensors()
        return made if len(self.reads) > 1 else [torch.zeros_like(tensor) for tensor in made]


def test_a_push_that_loses_a_tensor_is_named_by_the_verification(engines: Engines) -> None:
    engines.version += 1
    weights = list(checkpoint_tensors(engines.model))
    assert engines.sync.push(weights, engines.version, verify=True) is None
    engines.version += 1
    lost: Any = [Lost(each, []) if "1.mlp.up_proj" in each.specs[0].name else each for each in weights]
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    wrong = rf"differs in 1 tensor: {name} \(received with other values\)"
    with pytest.raises(PushDiffers, match=rf"version {engines.version}: engine 0 {wrong}; engine 1 {wrong}"):
        engines.sync.push(lost, engines.version, verify=True)


def test_a_parameter_that_was_left_out_is_named(engines: Engines) -> None:
    """The last test of these engines: they hold no whole weights afterwards."""
    *most, last = checkpoint_tensors(engines.model)
    left = f"left 1 engine parameters at their old values, among them.*{last.specs[0].name}"
    with pytest.raises(TimeoutError, match=left):
        engines.sync.push(most, engines.version)


LORA = LoraConfig(rank=4, alpha=12, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"])


@pytest.mark.long
def test_adapters_alone_reach_every_engine_even_after_it_was_killed_or_slept(
    ray_session: None, tmp_path: Path, tiny_model: str
) -> None:
    engines = Engines(tmp_path, tiny_model, "gloo", LORA)
    try:
        _check_adapters_alone(engines)
    finally:
        engines.close()


def _check_adapters_alone(engines: Engines) -> None:
    def check_answers() -> None:
        answers = engines.ask_all()
        assert [a.token_ids for a in answers] == [engines.expected()] * NUM_ENGINES
        assert {v for a in answers for v in a.policy_versions} == {engines.version}

    check_answers()
    old = engines.expected()
    for _ in range(2):
        assert engines.change_weights() is None
        assert engines.expected() != old, "the adapter must change the answer for this test to mean anything"
        check_answers()
    published: Any = ray.get(engines.hub.latest.remote(), timeout=30)
    assert {piece.name for slices, _ in published.buckets for piece in slices} == set(
        published.adapter.checksums
    )

    victim = engines.kill_one()
    engines.change_weights()  # while one replica is down
    alive = engines.wait_until_all_run(without=victim)
    assert {d["version"] for d in alive} == {engines.version}, "it must come back with the newest adapter"
    check_answers()

    # Sleeping engines keep their base, and get the adapter when they wake.
    freed = engines.sync.engines_sleep()
    assert freed >= NUM_ENGINES * KV_CACHE_BYTES
    engines.sync.engines_wake("weights")
    assert engines.change_weights() is None
    engines.sync.engines_wake("kv_cache")
    check_answers()

    # Another base than the checkpoint, as with QLoRA: sent once, and to an engine that starts later.
    engines.change_parameters()
    engines.version += 1
    engines.push(with_base=True)
    check_answers()
    victim = engines.kill_one()
    engines.change_weights()
    engines.wait_until_all_run(without=victim)
    check_answers()
