"""What the trainers' end does when engines do not answer; with engines: test_weight_sync.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.weights import direct as module
from rayrlhf.weights.direct import MOST_FAILURES, Courier
from rayrlhf.weights.transfer_group import Guest


def make_courier(tell_engines: Any, monkeypatch: pytest.MonkeyPatch) -> Courier:
    monkeypatch.setattr(module, "device_key", lambda device: "here")
    monkeypatch.setattr(module, "node_id", lambda: "node")
    cpu = torch.device("cpu")
    return Courier("ipc", tell_engines, rank=0, device=cpu, gather=list, timeout_seconds=5.0)


def test_engines_that_cannot_be_asked_are_a_problem_to_tell_and_in_the_end_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def nobody_answers(what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        asked.append(method)
        raise TimeoutError(f"{what}: engine 1 does not answer")

    courier = make_courier(nobody_answers, monkeypatch)
    for number in range(MOST_FAILURES):
        assert not courier.start(number, number, [])
        assert courier.finish() == "asking the engines where they are: engine 1 does not answer"
    assert not courier.start(9, 9, [])
    assert courier.finish() is None, "the object store has taken over for good"
    assert asked == ["describe"] * MOST_FAILURES
    courier.close()


def test_only_engines_on_the_trainers_devices_are_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_engines(what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        del what, method, arguments
        return [
            {"replica": 1, "engine_pid": 11, "devices": ["elsewhere"], "node": "other"},
            {"replica": 0, "engine_pid": 10, "devices": ["here"], "node": "node"},
        ]

    courier = make_courier(two_engines, monkeypatch)
    guests, everybody = courier._guests()
    assert list(guests) == [0] and not everybody
    courier.close()


@pytest.mark.parametrize("engine_node, host", [("node", "127.0.0.1"), ("another", "10.1.2.3")])
def test_the_store_leaves_loopback_only_for_engines_on_other_nodes(
    engine_node: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Store(module.TransferStore):
        def __init__(self, host: str) -> None:
            asked.append(host)
            super().__init__()

    monkeypatch.setattr(module, "TransferStore", Store)
    monkeypatch.setattr(module.ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    courier = make_courier(lambda *_: [], monkeypatch)
    courier._meeting({0: Guest(10, ("here",), engine_node)})
    assert asked == [host] and courier.strangers() == 0
    courier.close()
