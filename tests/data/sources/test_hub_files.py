"""Data sets of the hub, from a stand-in for its cache: no test has a network."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.example_data import SftDataConfig
from rayrlhf.data.checks import check_example_sources
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import DataFile, resolve_source
from rayrlhf.data.sources.hub_files import load_hub_dataset
from rayrlhf.data.sources.readers import plan_chunks, read_chunk


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set, and what it was asked for."""
    import datasets

    asked: list[tuple[Any, ...]] = []
    rows = datasets.Dataset.from_list([{"prompt": f"q{n}", "response": "a"} for n in range(3)])
    splits = datasets.DatasetDict({"train_sft": rows, "test": rows.select([2])})

    def load_dataset(path: str, name: str | None = None) -> Any:
        asked.append((path, name))
        if path != "owner/chats":
            raise ConnectionError("no network\nand more")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    "source, split, split_name, path",
    [
        ("owner/chats", "train", None, "owner/chats:train"),
        ("owner/chats", "eval", None, "owner/chats:test|eval|validation"),
        ("owner/chats", "train", "train_sft", "owner/chats:train_sft"),
        ("owner/chats:train_sft", "train", None, "owner/chats:train_sft"),
        ("owner/chats/small:train_sft", "train", "other", "owner/chats/small:train_sft"),
        ("hub@owner/chats", "train", None, "owner/chats:train"),
    ],
)
def test_ids_are_distinguished_from_paths(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, source: str, split: Any, split_name: Any, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source(source, split, split_name) == [DataFile("hub", path)]


def test_what_is_here_is_no_id(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match="owner/chats: no such file or folder"):
        resolve_source("owner/chats", "train")
    with pytest.raises(DataError, match=r"owner/chats.jsonl: no such file or folder"):
        resolve_source("owner/chats.jsonl", "train")
    with pytest.raises(DataError, match="wanted an id as hub@owner/name"):
        resolve_source("hub@chats", "train")


def test_rows_of_a_split(hub: list[tuple[Any, ...]]) -> None:
    [chunk] = plan_chunks(DataFile("hub", "owner/chats:train_sft"))
    rows = list(read_chunk(chunk))
    assert [row.columns["prompt"] for row in rows] == ["q0", "q1", "q2"]
    assert rows[2].place == "owner/chats:train_sft:3"
    assert len(load_hub_dataset("owner/chats/small:test|eval|validation")) == 1
    assert hub[-1] == ("owner/chats", "small")


def test_what_is_not_there_says_what_was_tried(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"has no split train; it has: train_sft, test; .*chats:train_sft, or"
    ):
        load_hub_dataset("owner/chats:train")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        load_hub_dataset("owner/none:train")
    error = str(caught.value)
    assert "only the cache was searched" in error
    assert "datasets.load_dataset('owner/none') raised ConnectionError: no network;" in error


def test_a_hub_data_set_is_checked_as_files_are(
    hub: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_example_sources(
        SftDataConfig.model_validate(
            {"train": "owner/chats", "train_split": "train_sft", "eval": "owner/chats"}
        )
    )
    with pytest.raises(DataError, match=r"data.train\[0\]: owner/none is no local file or folder"):
        check_example_sources(SftDataConfig.model_validate({"train": "owner/none"}))
    with pytest.raises(DataError, match=r"owner/chats:train_sft:1: .*no column 'question'"):
        config = {"train": "owner/chats:train_sft", "prompt_key": "question", "format": "prompt_response"}
        check_example_sources(SftDataConfig.model_validate(config))


def test_a_split_of_a_folder_by_name(tmp_path: Any) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).touch()
    assert [file.path for file in resolve_source(str(tmp_path), "eval", "dev")] == [f"{tmp_path}/dev.jsonl"]
    with pytest.raises(DataError, match=r"data.eval takes held.\* from a folder with splits"):
        resolve_source(str(tmp_path), "eval", "held")
