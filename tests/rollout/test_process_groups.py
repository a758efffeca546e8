"""Groups of one rank are made once; all others as torch makes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed

from rayrlhf.rollout.process_groups import groups_of_one_rank_are_shared


def test_groups_of_one_rank_are_made_once_per_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> object:
        made.append((ranks, timeout, backend, options))
        return object()

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    with groups_of_one_rank_are_shared():
        make = torch.distributed.new_group
        gloo = make([0], backend="gloo")
        assert make([0], backend="gloo", timeout=None) is gloo
        assert make([0], None, "gloo") is gloo
        others = [
            make([1], backend="gloo"),
            make([0], backend="nccl"),
            make([0, 1], backend="gloo"),
            make([0, 1], backend="gloo"),
            make([0], backend="gloo", timeout=timedelta(seconds=5)),
            make([0], backend="gloo", group_desc="sibling"),
            make(),
        ]
    assert len({id(group) for group in [gloo, *others]}) == 1 + len(others)
    assert made[-2:] == [([0], None, "gloo", {"group_desc": "sibling"}), (None, None, None, {})]
    assert torch.distributed.new_group is new_group
