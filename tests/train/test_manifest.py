"""Checkpoints are written atomically, and later damage is detected."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train import manifest

# xxh3's 128 bits of nothing: the first test vector of its specification's reference implementation.
XXH3_OF_NOTHING = "99aa06d3014798d86001c324468d497f"


def committed(folder: Path) -> Path:
    own = folder / "scratch" / "rank-0"
    (own / "actor").mkdir(parents=True)
    (own / "state.json").write_text("{}")
    (own / "empty").write_bytes(b"")
    (own / "actor" / "big.pt").write_bytes(bytes(range(256)) * 8192)  # 2 MiB
    manifest.commit(own, LocalFolder(folder / "step_000004"), {"metrics": {"step": 4}})
    assert not own.exists() and not list((folder / "scratch").iterdir())
    return folder / "step_000004"


def test_files_are_copied_in_the_background_from_a_nodes_own_disk(tmp_path: Path) -> None:
    own, staging = tmp_path / "disk/own", tmp_path / "storage/scratch"
    (own / "deep").mkdir(parents=True)
    (own / "deep/a.bin").write_bytes(b"a" * 100)
    folder = LocalFolder(tmp_path / "storage/step_000001")
    pending = manifest.Commit(own, folder, {"metrics": {}}, staging=staging)
    deadline = time.monotonic() + 20
    while not pending.is_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not folder.exists(), "it is no checkpoint before all ranks have finished"
    pending.finish()
    assert folder.sizes().keys() == {"deep/a.bin", "manifest.json"} and not own.exists()
    assert manifest.damage(folder, (manifest.read(folder) or {})["files"], full=True) is None


def test_a_copy_that_fails_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a").write_text("a")

    def move(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(manifest.shutil, "move", move)
    pending = manifest.Commit(own, LocalFolder(tmp_path / "step_000001"), {}, staging=tmp_path)
    with pytest.raises(OSError, match="disk full"):
        pending.finish()
    assert not (tmp_path / "step_000001").exists()


def test_sizes_and_checksums_of_every_file(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    found = manifest.read(LocalFolder(folder))
    assert found is not None and found["metrics"] == {"step": 4}
    assert {name: file["bytes"] for name, file in found["files"].items()} == {
        "actor/big.pt": 2 * 2**20,
        "empty": 0,
        "state.json": 2,
    }
    assert found["files"]["empty"]["xxh3"] == XXH3_OF_NOTHING
    assert manifest.damage(LocalFolder(folder), found["files"], full=True) is None


def test_a_folder_of_that_name_is_replaced(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    (folder / "state.json").write_text("damaged")
    (folder / "stray").write_text("of another time")
    again = committed(tmp_path)
    assert again == folder and not (folder / "stray").exists() and (folder / "state.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name, change, problem, seen_without_reading",
    [
        ("state.json", None, "state.json is missing", True),
        ("state.json", b"{", "state.json has 1 bytes of 2", True),
        ("state.json", b"[]", "state.json has other contents than were saved", True),
        ("actor/big.pt", b"x", "actor/big.pt has 1 bytes of 2,097,152", True),
        ("actor/big.pt", b"\0" * 2**21, "actor/big.pt has other contents than were saved", False),
    ],
)
def test_damage_is_seen(
    name: str, change: bytes | None, problem: str, seen_without_reading: bool, tmp_path: Path
) -> None:
    folder = committed(tmp_path)
    files = (manifest.read(LocalFolder(folder)) or {})["files"]
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change)
    local = LocalFolder(folder)
    assert manifest.damage(local, files, full=True) == problem
    assert manifest.damage(local, files, full=False) == (problem if seen_without_reading else None)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "1"}}}']
)
def test_a_damaged_manifest_is_damage(text: str, tmp_path: Path) -> None:
    folder = committed(tmp_path)
    (folder / manifest.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json (cannot be read|has no list of files)"):
        manifest.read(LocalFolder(folder))


def test_a_long_check_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = committed(tmp_path)
    monkeypatch.setattr(manifest, "PROGRESS_SECONDS", -1.0)
    lines: list[str] = []
    files = (manifest.read(LocalFolder(folder)) or {})["files"]
    assert manifest.damage(LocalFolder(folder), files, full=True, say=lines.append) is None
    assert lines == ["checking step_000004: 0.0 of 0.0 GB"]


def test_old_checkpoints_are_checked_for_truncated_files(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    (folder / manifest.MANIFEST).unlink()
    assert manifest.read(LocalFolder(folder)) is None
    assert manifest.damage_without_manifest(folder) == "actor/big.pt is truncated, or not a tensor file"
    (folder / "actor" / "big.pt").unlink()
    assert manifest.damage_without_manifest(folder) is None
    (folder / "state.json").write_text(json.dumps({})[:1])
    assert "state.json cannot be read" in str(manifest.damage_without_manifest(folder))
