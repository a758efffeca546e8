"""What the engine reports of its weights."""

from __future__ import annotations

import pytest

from rayrlhf.rollout.engine import _version


def test_versions_are_vllms_labels() -> None:
    assert [_version(label) for label in ("default", "0", "12")] == [0, 0, 12]
    with pytest.raises(ValueError, match="the engine's weights have the version 'v2'"):
        _version("v2")
