"""Which files a source means."""

from __future__ import annotations

import json

import pytest

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import DataFile, resolve_source


@pytest.fixture
def folder(tmp_path):
    """Makes empty files in a folder and returns it."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names_of(files):
    return [(file.type, file.path.rsplit("/", 1)[1]) for file in files]


def test_a_file_by_suffix_or_by_type(folder):
    root = folder("a.jsonl", "b.json", "c.csv", "d.parquet", "e.arrow", "f.txt")
    types = {"a.jsonl": "jsonl", "b.json": "json", "c.csv": "csv", "d.parquet": "parquet", "e.arrow": "arrow"}
    for name, type_ in types.items():
        assert resolve_source(f"{root}/{name}", "train") == [DataFile(type_, f"{root}/{name}")]
    assert resolve_source(f"jsonl@{root}/f.txt", "train") == [DataFile("jsonl", f"{root}/f.txt")]
    with pytest.raises(DataError, match=r"no type is known for f.txt; name it, as in jsonl@"):
        resolve_source(f"{root}/f.txt", "train")


def test_relative_paths_become_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder("a.jsonl"))
    [file] = resolve_source("a.jsonl", "train")
    assert file.path == str(folder() / "a.jsonl")


def test_a_folder_without_splits_is_read_whole_and_sorted(folder):
    root = folder("b.jsonl", "a.jsonl", "training.jsonl", "notes.md", ".hidden.jsonl", "sub/c.jsonl")
    for split in ("train", "eval"):
        assert names_of(resolve_source(f"jsonl@{root}", split)) == [
            ("jsonl", "a.jsonl"),
            ("jsonl", "b.jsonl"),
            ("jsonl", "training.jsonl"),
        ]
    assert resolve_source(str(root), "train") == resolve_source(f"jsonl@{root}", "train")


@pytest.mark.parametrize(
    ("held_out", "chosen"),
    [
        (["test.jsonl", "validation.jsonl", "eval.jsonl"], "test.jsonl"),
        (["validation.jsonl", "eval.jsonl"], "eval.jsonl"),
        (["validation.jsonl"], "validation.jsonl"),
    ],
)
def test_a_folder_with_splits_gives_each_purpose_its_own(folder, held_out, chosen):
    root = folder("train.jsonl", *held_out)
    assert names_of(resolve_source(f"json@{root}", "train")) == [("json", "train.jsonl")]
    assert names_of(resolve_source(f"json@{root}", "eval")) == [("json", chosen)]


def test_split_names_of_hub_shards_are_understood(folder):
    root = folder(
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"
    )
    assert len(resolve_source(str(root), "train")) == 2
    assert names_of(resolve_source(str(root), "eval")) == [("parquet", "test-00000-of-00001.parquet")]


def test_test_files_are_never_trained_on_by_accident(folder):
    root = folder("test.jsonl")
    with pytest.raises(DataError, match=r"data.train takes train.\* .* holds: test.jsonl"):
        resolve_source(str(root), "train")
    with pytest.raises(DataError, match=r"data.eval takes test.\* or eval.\* or validation.\*"):
        resolve_source(str(folder("x/train.jsonl") / "x"), "eval")


def test_a_glob_takes_what_matches(folder):
    root = folder("b1.jsonl", "b0.jsonl", "b2.md", "c.jsonl")
    assert names_of(resolve_source(f"jsonl@{root}/b*", "train")) == [
        ("jsonl", "b0.jsonl"),
        ("jsonl", "b1.jsonl"),
    ]
    folder("deep/er/d.jsonl")
    assert names_of(resolve_source(f"{root}/**/d.*", "train")) == [("jsonl", "d.jsonl")]
    with pytest.raises(DataError, match="no file matches this pattern"):
        resolve_source(f"jsonl@{root}/x*.jsonl", "train")


def test_a_typo_in_the_path_is_answered_with_what_is_there(folder):
    root = folder("prompts/train.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*/prompts\?"):
        resolve_source(f"{root}/promts/train.jsonl", "train")
    with pytest.raises(DataError, match=r"/prompts exists and holds: train.jsonl"):
        resolve_source(f"{root}/prompts/zzz.csv", "train")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("jsnl@x", r"unknown type 'jsnl'; did you mean jsonl@x\?"),
        ("zip@x", "unknown type 'zip'; the types are: jsonl, json, csv, parquet, arrow, dataset"),
        ("jsonl@", "names no path"),
        ("file:///no/such/x.jsonl", "no such file, folder or match"),
        ("jsonl@file:///no/such/x.jsonl", "no such file, folder or match"),
    ],
)
def test_sources_that_cannot_be_meant(source, reason):
    with pytest.raises(DataError, match=reason):
        resolve_source(source, "train")


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    root = folder("a.jsonl")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(
        "rayrlhf.data.sources.files.os.scandir", refuse
    )  # tests may run as root, who reads everything
    with pytest.raises(DataError, match=f"jsonl@{root} cannot be read: .*Permission denied"):
        resolve_source(f"jsonl@{root}", "train")


def test_an_at_sign_may_belong_to_the_path(folder):
    root = folder("me@host/a.jsonl", "v@1.jsonl")
    assert names_of(resolve_source(f"{root}/me@host/a.jsonl", "train")) == [("jsonl", "a.jsonl")]
    assert names_of(resolve_source(f"jsonl@{root}/v@1.jsonl", "train")) == [("jsonl", "v@1.jsonl")]


def test_a_folder_of_several_types_must_be_distinguished(folder):
    root = folder("a.jsonl", "b.csv")
    with pytest.raises(DataError, match=r"several types \(csv, jsonl\); name one, as in jsonl@"):
        resolve_source(str(root), "train")
    assert names_of(resolve_source(f"csv@{root}", "train")) == [("csv", "b.csv")]
    with pytest.raises(DataError, match=r"no .parquet or .pq file in .*; it holds: "):
        resolve_source(f"parquet@{root}", "train")


def test_saved_data_sets(folder):
    root = folder("one/state.json", "both/train/state.json", "both/test/state.json")
    (root / "both/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert resolve_source(f"{root}/one", "eval") == [DataFile("dataset", f"{root}/one")]
    assert resolve_source(f"dataset@{root}/both", "train") == [DataFile("dataset", f"{root}/both/train")]
    assert resolve_source(f"{root}/both", "eval") == [DataFile("dataset", f"{root}/both/test")]
    (root / "both/dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(DataError, match=r"has: train; name one, as in dataset@.*/both/train"):
        resolve_source(f"{root}/both", "eval")
    with pytest.raises(DataError, match="was not made by save_to_disk"):
        resolve_source(f"dataset@{root}", "train")
    with pytest.raises(DataError, match="wants a folder"):
        resolve_source(f"dataset@{root}/one/state.json", "train")
