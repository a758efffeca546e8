"""The same operations on a local folder and on one in a bucket (a real S3 server, Arrow's client)."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from rayrlhf.storage.folder import Folder, LocalFolder, RemoteFolder, on_this_node, run_folder, stored
from rayrlhf.storage.run_file import RunFile, fetched, run_file
from tests.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return LocalFolder(tmp_path / "run")
    if request.param == "memory":  # a scheme of fsspec
        return RemoteFolder(f"memory://{tmp_path.name}/run")
    request.getfixturevalue("server")
    return RemoteFolder(f"s3://{BUCKET}/{tmp_path.name}/run")


def test_a_folder_that_is_not_there(folder: Folder) -> None:
    assert not folder.exists() and folder.folders() == [] and folder.sizes() == {}
    assert folder.read("file") is None
    folder.remove("file")


def test_files_and_folders(folder: Folder) -> None:
    folder.write("one.json", "é")
    folder.child("step_2").write("a/b.bin", "12345")
    folder.child("step_10").write("c", "")
    assert folder.name == "run" and folder.child("step_2").parent == folder
    assert folder.exists() and folder.folders() == ["step_10", "step_2"]
    assert folder.sizes() == {"one.json": 2, "step_10/c": 0, "step_2/a/b.bin": 5}
    assert folder.read("one.json") == "é".encode()
    read: list[int] = []
    wanted = xxhash.xxh3_128(b"12345").hexdigest()
    assert folder.child("step_2").checksum("a/b.bin", read.append) == wanted and sum(read) == 5
    folder.write("one.json", "two")
    assert folder.read("one.json") == b"two"
    folder.remove("one.json")
    folder.remove("step_2")
    assert folder.sizes() == {"step_10/c": 0}
    assert pickle.loads(pickle.dumps(folder)).sizes() == {"step_10/c": 0}


def test_up_and_down(server: None, tmp_path: Path) -> None:
    folder = RemoteFolder(f"s3://{BUCKET}/{tmp_path.name}")
    contents = {f"deep/{index}.bin": bytes([index]) * 100_000 for index in range(20)}
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name, each in contents.items():
        (source / name).write_bytes(each)
    folder.upload(source, contents)
    folder.download(contents, tmp_path / "target")
    assert {
        file.relative_to(tmp_path / "target").as_posix(): file.read_bytes()
        for file in (tmp_path / "target").rglob("*.bin")
    } == contents
    with pytest.raises(OSError, match="nothing"):
        folder.download(["nothing"], tmp_path / "target")
    assert not list((tmp_path / "target").glob("*nothing*"))


def runs_of(tmp_path: Path, *nodes: str) -> list[Any]:
    """A run as several nodes see it."""
    url = f"s3://{BUCKET}/{tmp_path.name}/run"
    return [SimpleNamespace(path=str(tmp_path / node), url=url) for node in nodes]


def test_an_export_and_shards_on_other_nodes(server: None, tmp_path: Path) -> None:
    here, there = runs_of(tmp_path, "here", "there")
    (tmp_path / "here/export/adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/a"):
        (tmp_path / "here/export" / name).write_text(name)
    run_folder(here, "export").write("of an earlier one", "")
    assert stored(there, "export", write=False) == stored(here, "export", write=True) == f"{here.url}/export"
    assert run_folder(there, "export").sizes().keys() == {"config.json", "model.safetensors", "adapter/a"}
    path = on_this_node(there, "export")
    assert path == tmp_path / "there/export" and (path / "adapter/a").read_text() == "adapter/a"


def test_a_file_is_fetched_where_it_is_opened(server: None, tmp_path: Path) -> None:
    here, there = runs_of(tmp_path, "here", "there")
    (tmp_path / "here/data").mkdir(parents=True)
    file = tmp_path / "here/data/rows"
    file.write_text("first")
    shared = pickle.loads(pickle.dumps(run_file(here, "data/rows")))
    elsewhere = RunFile(str(tmp_path / "there/data/rows"), shared.url, shared.xxh3)
    assert Path(elsewhere).read_text() == "first" and str(shared) == f"{here.url}/data/rows"
    file.write_text("other")  # of the same length
    other = run_file(here, "data/rows")
    assert Path(RunFile(elsewhere.path, other.url, other.xxh3)).read_text() == "other"
    assert fetched(runs_of(tmp_path, "third")[0], "data/rows").read_text() == "other"
    assert not fetched(there, "data/nothing").exists()


def test_a_shared_folder_needs_no_copies(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(path=str(tmp_path), url=None)
    (tmp_path / "rows").write_text("first")
    assert run_file(run, "rows") == RunFile(str(tmp_path / "rows"))
    assert stored(run, "export", write=True) == str(tmp_path / "export")
    assert on_this_node(run, "export") == fetched(run, "export") == tmp_path / "export"
