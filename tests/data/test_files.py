"""Which files a source means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.data.files import DataFile, Split, resolve_source
from rayrlhf.data.rows import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def names(source: str, split: Split = "train") -> list[tuple[str, str]]:
    return [(file.type, Path(file.path).name) for file in resolve_source(source, split)]


def message(source: str, split: Split = "train") -> str:
    with pytest.raises(DataError) as caught:
        resolve_source(source, split)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, type_",
    [
        ("a.jsonl", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.json", "json"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
        ("a.arrow", "arrow"),
    ],
)
def test_the_suffix_tells_the_type(tmp_path: Path, name: str, type_: str) -> None:
    touch(tmp_path, name)
    assert resolve_source(str(tmp_path / name), "train") == [DataFile(type_, str(tmp_path / name))]


def test_a_named_type_wins_over_the_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "rows.txt", "b.json")
    assert names(f"jsonl@{tmp_path}/rows.txt") == [("jsonl", "rows.txt")]
    assert names(f"jsonl@{tmp_path}/b.json") == [("jsonl", "b.json")]


def test_a_folder_without_splits_is_read_whole_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.jsonl", "training.jsonl", "README.md", ".hidden.jsonl", "deeper/c.jsonl")
    wanted = [("jsonl", "a.jsonl"), ("jsonl", "b.jsonl"), ("jsonl", "training.jsonl")]
    assert names(f"jsonl@{tmp_path}") == names(str(tmp_path)) == names(str(tmp_path), "eval") == wanted


def test_a_folder_with_splits_gives_each_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "train-00001-of-2.jsonl", "train-00000-of-2.jsonl", "test.jsonl", "validation.jsonl")
    assert [name for _, name in names(str(tmp_path))] == ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"]
    assert names(str(tmp_path), "eval") == [("jsonl", "test.jsonl")]
    (tmp_path / "test.jsonl").unlink()
    assert names(str(tmp_path), "eval") == [("jsonl", "validation.jsonl")]
    (tmp_path / "validation.jsonl").unlink()
    assert "data.eval takes test.* or eval.* or validation.*" in message(str(tmp_path), "eval")


def test_a_glob_takes_every_matching_file_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "y/2.jsonl", "x/1.jsonl", "x/0.csv")
    assert names(f"{tmp_path}/*/*.jsonl") == [("jsonl", "1.jsonl"), ("jsonl", "2.jsonl")]
    assert names(f"jsonl@{tmp_path}/**/*") == [("jsonl", "1.jsonl"), ("jsonl", "2.jsonl")]
    assert "no file matches" in message(f"{tmp_path}/*.parquet")


def test_a_path_may_hold_an_at_sign(tmp_path: Path) -> None:
    touch(tmp_path, "a@b/c.jsonl")
    assert names(f"{tmp_path}/a@b/c.jsonl") == [("jsonl", "c.jsonl")]
    assert names(f"jsonl@{tmp_path}/a@b") == [("jsonl", "c.jsonl")]


def test_a_saved_data_set_is_known_by_its_files(tmp_path: Path) -> None:
    touch(tmp_path, "one/state.json", "one/data-00000-of-00001.arrow", "many/train/state.json")
    (tmp_path / "many" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "extra"]}))
    assert resolve_source(f"dataset@{tmp_path}/one", "eval") == [DataFile("dataset", f"{tmp_path}/one")]
    assert resolve_source(f"{tmp_path}/many", "train") == [DataFile("dataset", f"{tmp_path}/many/train")]
    assert "this data set has: train, extra" in message(f"dataset@{tmp_path}/many", "eval")


def test_what_is_wrong_is_said_with_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "table.csv", "notes.txt")
    assert f"did you mean {tmp_path}/train.jsonl?" in message(f"{tmp_path}/trian.jsonl")
    assert "did you mean jsonl@x?" in message("jsonnl@x")
    assert "the types are: jsonl" in message("hub@x")
    assert "no type is known for notes.txt" in message(f"{tmp_path}/notes.txt")
    assert "no .parquet or .pq file" in message(f"parquet@{tmp_path}")
    assert "not a URL" in message("s3://bucket/train.jsonl")
    assert "names no path" in message("jsonl@")
    assert "was not made by save_to_disk" in message(f"dataset@{tmp_path}")
    assert "wants a folder" in message(f"dataset@{tmp_path}/train.jsonl")
    (tmp_path / "train.jsonl").unlink()
    touch(tmp_path, "more.jsonl")
    assert "several types (csv, jsonl)" in message(str(tmp_path))
