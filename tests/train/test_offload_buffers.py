"""States move to the same host buffers at every turn."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.train.device_memory import to_device, to_host

CPU = torch.device("cpu")


def test_states_keep_their_values_and_the_buffers_their_place() -> None:
    states = [torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    wanted = [state.clone() for state in states]
    buffers: list[Tensor] = []
    to_host(states, buffers, pinned=False)
    places = [buffer.data_ptr() for buffer in buffers]
    assert [state.data_ptr() for state in states] == places
    to_host(states, buffers, pinned=False)  # again, without a turn in between
    to_device(states, CPU)
    assert all(map(torch.equal, states, wanted))
    assert not {state.data_ptr() for state in states} & set(places)
    for state in states:
        state.mul_(3)
    to_host(states, buffers, pinned=False)
    assert [buffer.data_ptr() for buffer in buffers] == places, "pinned once"
    assert all(torch.equal(buffer, 3 * each) for buffer, each in zip(buffers, wanted, strict=True))


def test_states_that_come_later_get_buffers_too() -> None:
    """AdamW has no moments before its first step."""
    master, buffers = torch.zeros(3), []
    to_host([master], buffers, pinned=False)
    states = [master, torch.ones(3), torch.full((2, 2), 2.0)]
    to_host(states, buffers, pinned=False)
    assert [buffer.sum().item() for buffer in buffers] == [0, 3, 8]
    to_host([torch.full((5,), 1.0)], buffers, pinned=False)
    assert buffers[0].shape == (5,)
