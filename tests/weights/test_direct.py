"""Trainer side of direct transfer when engines do not answer; with engines: test_weight_sync.py."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from rayrlhf.weights import direct as module
from rayrlhf.weights.buckets import GatheredTensor, lay_out, plan_buckets
from rayrlhf.weights.direct import MAX_FAILURES, DirectSender
from rayrlhf.weights.transfer_group import DirectPush, Receiver, abort_transfer, join


def make_sender(call_engines: Any, monkeypatch: pytest.MonkeyPatch) -> DirectSender:
    monkeypatch.setattr(module, "device_key", lambda device: "here")
    monkeypatch.setattr(module, "node_id", lambda: "node")
    cpu = torch.device("cpu")
    return DirectSender("ipc", call_engines, rank=0, device=cpu, gather=list, timeout_seconds=5.0)


class Together:
    """The ranks of a trainer in threads."""

    def __init__(self, size: int) -> None:
        self.parts: list[list[Any]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size)

    def gather(self, rank: int, items: list[Any]) -> list[Any]:
        self.parts[rank] = items
        self.barrier.wait(20)
        everything = [item for part in self.parts for item in part]
        self.barrier.wait(20)
        return everything


class Engines:
    """One engine per device; each receives a bucket of a push, as a worker of vLLM does."""

    def __init__(self, devices: dict[int, str], num_bytes: int) -> None:
        self.devices = devices
        self.num_bytes = num_bytes
        self.stores: set[str] = set()
        self.fails: int | None = None

    def call(self, what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        del what
        if method == "describe":
            return [
                {"replica": i, "engine_pid": i, "devices": [device], "node": device[:6]}
                for i, device in self.devices.items()
            ]
        [push] = arguments
        with ThreadPoolExecutor(len(self.devices)) as pool:
            return list(pool.map(lambda replica: self.receive(push, replica), self.devices))

    def receive(self, push: DirectPush, replica: int) -> dict[str, Any]:
        group, device = push.transfer_group, self.devices[replica]
        self.stores.add(group.store_of(device).endpoint)
        link = join(group, rank=group.first_rank(replica), device=torch.device("cpu"), key=device)
        try:
            for _ in push.buckets:
                if replica == self.fails:
                    abort_transfer(group, f"engine {replica}: out of memory", replica)
                link.receive(self.num_bytes)
                link.release()
        finally:
            if replica == self.fails:
                link.end("it has failed")
        return {"replica": replica}


def pushed(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A push by the trainers on the engines' devices; what each rank says of it."""
    devices = list(engines.devices.values())
    ranks = Together(len(devices))
    rank_of = threading.local()
    monkeypatch.setattr(module, "device_key", lambda _: devices[rank_of.value])
    monkeypatch.setattr(module, "node_id", lambda: devices[rank_of.value][:6])
    monkeypatch.setattr(module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    tensors = [GatheredTensor("weight", torch.ones(engines.num_bytes // 4))]
    [(group, slices)] = [(group, lay_out(group)) for group in plan_buckets(tensors, 2**20)]

    def train(rank: int) -> str | None:
        rank_of.value = rank
        sender = DirectSender(
            "ipc",
            engines.call,
            rank=rank,
            device=torch.device("cpu"),
            gather=partial(ranks.gather, rank),
            timeout_seconds=20.0,
        )
        try:
            assert sender.start(1, 1, [slices])
            sender.send(group, slices)
            return sender.finish()
        finally:
            sender.close()

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(train, range(len(devices))))


FOUR = {0: "node 0 gpu 0", 1: "node 0 gpu 1", 2: "node 1 gpu 0", 3: "node 1 gpu 1"}


def test_by_ipc_every_node_has_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(FOUR, 4096)
    assert pushed(engines, monkeypatch) == [None] * 4
    assert len(engines.stores) == 2


def test_a_failure_on_one_node_is_every_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(FOUR, 4096)
    engines.fails = 3
    problems = pushed(engines, monkeypatch)
    assert len(set(problems)) == 1 and "engine 3: out of memory" in str(problems[0])


def test_unreachable_engines_are_reported_and_not_called_after_max_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []

    def no_answer(what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        called.append(method)
        raise TimeoutError(f"{what}: engine 1 does not answer")

    sender = make_sender(no_answer, monkeypatch)
    for number in range(MAX_FAILURES):
        assert not sender.start(number, number, [])
        assert sender.finish() == "querying the engines' devices: engine 1 does not answer"
    assert not sender.start(9, 9, [])
    assert sender.finish() is None, "all pushes go through the object store"
    assert called == ["describe"] * MAX_FAILURES
    sender.close()


def test_only_engines_on_the_trainers_devices_are_receivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_engines(what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        del what, method, arguments
        return [
            {"replica": 1, "engine_pid": 11, "devices": ["elsewhere"], "node": "other"},
            {"replica": 0, "engine_pid": 10, "devices": ["here"], "node": "node"},
        ]

    sender = make_sender(two_engines, monkeypatch)
    receivers, reaches_all = sender._receivers()
    assert list(receivers) == [0] and not reaches_all
    sender.close()


@pytest.mark.parametrize("engine_node, host", [("node", "127.0.0.1"), ("another", "10.1.2.3")])
def test_the_store_leaves_loopback_only_for_engines_on_other_nodes(
    engine_node: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: list[str] = []

    class Store(module.TransferStore):
        def __init__(self, host: str) -> None:
            hosts.append(host)
            super().__init__()

    monkeypatch.setattr(module, "TransferStore", Store)
    monkeypatch.setattr(module.ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    sender = make_sender(lambda *_: [], monkeypatch)
    sender._form_group({0: Receiver(10, ("here",), engine_node)})
    assert hosts == [host]
    sender.close()
