"""Data behind URLs are copied once, again when they change, and never half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources import remote
from rayrlhf.data.sources.files import DataFile, hub_id_of, resolve_source
from rayrlhf.data.sources.remote import local_copy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYRLHF_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """By file://, which Arrow knows as it knows s3://."""
    folder = tmp_path / "bucket"
    (folder / "sub").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "notes.txt", "sub/more.jsonl", ".hidden.jsonl"):
        (folder / name).write_text(name)
    return folder


def text(path: str) -> str:
    return Path(path).read_text()


def test_a_file_keeps_its_name(bucket: Path, cache: Path) -> None:
    url = f"file://{bucket}/train.jsonl"
    [file] = resolve_source(url, "train")
    assert file.type == "jsonl" and Path(file.path).name == "train.jsonl"
    assert Path(file.path).is_relative_to(cache) and text(file.path) == "train.jsonl"
    [typed] = resolve_source(f"json@{url}", "train")
    assert typed == DataFile("json", file.path)
    assert hub_id_of(url) is None and hub_id_of(f"json@{url}") is None


def test_a_folder_and_its_splits(bucket: Path) -> None:
    [train] = resolve_source(f"file://{bucket}", "train")
    [held_out] = resolve_source(f"file://{bucket}/", "eval")
    assert (text(train.path), text(held_out.path)) == ("train.jsonl", "test.jsonl")


def test_a_pattern(bucket: Path) -> None:
    folder = Path(local_copy("x", f"file://{bucket}/t*.jsonl"))
    assert sorted(p.name for p in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    deep = Path(local_copy("x", f"file://{bucket}/*.jsonl"))
    assert (deep / "sub" / "more.jsonl").exists() and not (deep / ".hidden.jsonl").exists()


def test_it_is_copied_once_and_again_when_it_changes(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    copy = remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *arguments: (copied.append(arguments), copy(*arguments)))
    url = f"file://{bucket}/train.jsonl"
    first = local_copy("x", url)
    assert local_copy("x", url) == first and len(copied) == 1
    (bucket / "train.jsonl").write_text("longer than it was")
    second = local_copy("x", url)
    assert second != first and text(second) == "longer than it was" and len(copied) == 2


def test_what_breaks_off_leaves_nothing(bucket: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(source: Any, sink: Any, size: int) -> None:
        sink.write(b"half")
        raise OSError("connection lost")

    monkeypatch.setattr(remote.shutil, "copyfileobj", breaks)
    with pytest.raises(DataError, match=r"cannot be copied to .*: connection lost"):
        local_copy("x", f"file://{bucket}/train.jsonl")
    assert list(cache.iterdir()) == []


def test_other_schemes_are_fsspecs() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/data/rows.jsonl", b"rows")
    assert text(local_copy("x", "memory://data/rows.jsonl")) == "rows"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///no/such/file.jsonl", "there is no such file, folder or match"),
        ("nosuch://bucket/x.jsonl", "nosuch://bucket/x.jsonl cannot be read: "),
        ("s3://key:secret@bucket/x.jsonl", r"^s3://\*\*\*@bucket/x.jsonl: the URL has credentials"),
    ],
)
def test_what_cannot_be_read(url: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as refused:
        local_copy(url, url)
    assert "secret" not in str(refused.value)
