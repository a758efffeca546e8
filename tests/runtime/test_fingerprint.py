"""A run resumes only with the config and data that its results depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runtime.fingerprint import (
    check_identity,
    differences,
    without_operational_keys,
)
from rayrlhf.runtime.preflight import InputError
from rayrlhf.storage.atomic import write_atomically

IDENTITY: dict[str, Any] = {"run": {"seed": 0}, "reward": None, "stop": [], "sources": [{"weight": 1.0}]}


def test_differences_are_named_by_their_path() -> None:
    now = {"run": {"seed": 1}, "reward": {"clip": [0, 1]}, "stop": ["é"], "sources": [{"weight": 1.0}]}
    assert differences(IDENTITY, now) == [
        "run.seed: was 0, is 1",
        "reward: was null, is nothing",
        "stop: was [], is nothing",
        "reward.clip.0: was nothing, is 0",
        "reward.clip.1: was nothing, is 1",
        'stop.0: was nothing, is "é"',
    ]
    assert differences(IDENTITY, IDENTITY) == []


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run" / "identity.json"
    check_identity(file, IDENTITY, resume="never")
    check_identity(file, IDENTITY, resume="auto")
    with pytest.raises(InputError, match=r"run\.seed: was 0, is 7"):
        check_identity(file, IDENTITY | {"run": {"seed": 7}}, resume="auto")
    check_identity(file, IDENTITY, resume="auto")  # the refused one has left no trace
    with pytest.raises(InputError, match=r"run\.resume=never"):
        check_identity(file, IDENTITY, resume="never")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"run": ', bytes(range(256))])
def test_a_damaged_identity_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "identity.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"identity\.json cannot be read .* Fix: choose another run\.name"):
        check_identity(file, IDENTITY, resume="auto")


def test_what_changes_no_result_may_change() -> None:
    tree = {"sources": [{"type": "math", "num_replicas": 2, "weight": 1.0}], "timeout_seconds": 3}
    assert without_operational_keys(tree) == {"sources": [{"type": "math", "weight": 1.0}]}


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "two"
