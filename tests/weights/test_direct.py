"""Trainer side of direct transfer when engines do not answer; with engines: test_weight_sync.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.weights import direct as module
from rayrlhf.weights.direct import MAX_FAILURES, DirectSender
from rayrlhf.weights.transfer_group import Receiver


def make_sender(call_engines: Any, monkeypatch: pytest.MonkeyPatch) -> DirectSender:
    monkeypatch.setattr(module, "device_key", lambda device: "here")
    monkeypatch.setattr(module, "node_id", lambda: "node")
    cpu = torch.device("cpu")
    return DirectSender("ipc", call_engines, rank=0, device=cpu, gather=list, timeout_seconds=5.0)


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
    sender._transfer_group({0: Receiver(10, ("here",), engine_node)})
    assert hosts == [host] and sender.num_refused_connections() == 0
    sender.close()
