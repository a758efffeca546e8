"""Rows of columnar files on their way to prompts and examples: padding, columns that JSON cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import SftDataConfig
from rayrlhf.data import prepare
from rayrlhf.data.checks import check_sources
from rayrlhf.data.row_filter import Tally
from rayrlhf.data.rows.row import RawRow, columns_to_json
from rayrlhf.data.sources.files import DataFile
from rayrlhf.data.sources.readers import plan_chunks, read_chunk
from tests.data.templates import tokenizer_like


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def called(name: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


CITY, NUMBER = {"type": "string", "enum": ["Oslo"]}, {"type": "integer", "minimum": 0}
ROWS = [
    {"q": "weather?", "call": called("weather", city="Oslo"), "tools": [tool("weather", city=CITY)]},
    {"q": "2+2?", "call": called("add", a=2, b=2), "tools": [tool("add", a=NUMBER, b=NUMBER)]},
    {"q": "now?", "call": called("now"), "tools": [tool("now")]},
]


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    asked = {"role": "user", "content": row["q"]}
    return {"messages": [asked, {"role": "assistant", "tool_calls": row["call"]}], "tools": row["tools"]}


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> DataFile:
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "dataset":
        import datasets

        datasets.Dataset(table).save_to_disk(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFile(kind, str(path))


def read(file: DataFile) -> list[RawRow]:
    return [row for chunk in plan_chunks(file) for row in read_chunk(chunk)]


def stage_rows(file: DataFile) -> pa.Table:
    """What a source gives to the stage that renders."""
    described = []
    for row in read(file):
        columns_json, left_out = columns_to_json(row.columns)
        described.append(
            {
                "source": 0,
                "_file": row.file,
                "_row": row.row,
                "columns_json": columns_json,
                "problem": row.problem,
                "padded": json.dumps(row.padded),
                "left_out": json.dumps([*row.left_out, *left_out]),
            }
        )
    return pa.Table.from_pylist(described)


@pytest.fixture
def _qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "prompt_tokenizer", lambda *_: tokenizer_like("qwen"))


def rendered_as(rows: prepare.PromptRows | prepare.ExampleRows, file: Any) -> pa.Table:
    return prepare.RenderStage(rows, "", trust_remote_code=False, chat_template=None)(stage_rows(file))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "dataset", "jsonl"])
@pytest.mark.usefixtures("_qwen")
def test_19_every_row_has_its_own_keys_whatever_file_it_comes_from(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, [conversation(row) for row in ROWS])
    config = SftDataConfig.model_validate({"train": "a"})
    rendered = rendered_as(prepare.ExampleRows(config, "train", 0), file)
    assert rendered.column("problem").to_pylist() == [""] * 3
    decode = tokenizer_like("qwen").decode
    for [ids], row in zip(rendered.column("input_ids").to_pylist(), ROWS, strict=True):
        text = decode(ids)
        assert f"Tools:{json.dumps(row['tools'][0])}<|im_end|>" in text
        assert f'"arguments": {json.dumps(row["call"][0]["function"]["arguments"])}}}' in text
        assert "null" not in text


@pytest.mark.usefixtures("_qwen")
def test_19_json_lines_keep_their_nulls(tmp_path: Path) -> None:
    row = {"q": "now?", "call": called("now", zone=None), "tools": [tool("now", zone={"default": None})]}
    file = written(tmp_path, "jsonl", [conversation(row)])
    config = SftDataConfig.model_validate({"train": "a"})
    rendered = rendered_as(prepare.ExampleRows(config, "train", 0), file)
    text = tokenizer_like("qwen").decode(rendered.column("input_ids").to_pylist()[0][0])
    assert '"zone": {"default": null}' in text and '"arguments": {"zone": null}' in text


@pytest.mark.usefixtures("_qwen")
def test_19_rewards_get_their_columns_as_they_are_and_bytes_are_left_out(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["q"], "name": None}],
            "tools": row["tools"],
            "answer": {"value": index, "unit": None},
            "image": {"bytes": b"\x89PNG", "path": None},
            "level": None,
        }
        for index, row in enumerate(ROWS)
    ]
    file = written(tmp_path, "parquet", rows)
    config = PromptDataConfig.model_validate({"train": file.path, "label_key": "answer"})
    check_sources(config)
    rendered = rendered_as(prepare.PromptRows(config), file)
    assert rendered.column("problem").to_pylist() == [""] * 3
    for index, columns in enumerate(map(json.loads, rendered.column("columns_json").to_pylist())):
        assert columns["answer"] == {"value": index, "unit": None}, "a null of a reward's own"
        assert columns["tools"] == ROWS[index]["tools"] and columns["level"] is None
        assert "image" not in columns
    tally = Tally(prepare.PromptRows(config).policy, [0], ("prompt_ids",))
    assert tally.usable_rows(rendered).num_rows == 3
    [(note, places)] = tally.notes.items()
    assert note == "column 'image' (bytes) dropped, which JSON cannot represent"
    assert (places.count, places.first) == (3, [f"{file.path}:{number}" for number in (1, 2, 3)])


@pytest.mark.usefixtures("_qwen")
def test_19_a_needed_column_that_was_left_out_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "parquet", [{"prompt": b"hi", "n": 1}])
    config = PromptDataConfig.model_validate({"train": file.path})
    rendered = rendered_as(prepare.PromptRows(config), file)
    [problem] = rendered.column("problem").to_pylist()
    assert problem.startswith("no column 'prompt'") and problem.endswith("columns dropped: 'prompt' (bytes)")


def test_19_maps_are_objects(tmp_path: Path) -> None:
    field = pa.field("arguments", pa.map_(pa.string(), pa.string()))
    table = pa.table({"arguments": pa.array([[("city", "Oslo")], []], field.type)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [row.columns for row in read(DataFile("parquet", str(tmp_path / "a.parquet")))]
    assert found == [{"arguments": {"city": "Oslo"}}, {"arguments": {}}]


def test_19_saved_data_sets_with_images_and_json(tmp_path: Path) -> None:
    """An image is not decoded, which would take a library; the nulls of the Json feature are its own."""
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image(),
            "frames": datasets.List(datasets.Image()),
            "tools": datasets.Json(),
        }
    )
    image = {"bytes": b"no image", "path": None}
    row = {"prompt": "hi", "image": image, "frames": [image], "tools": [{"name": "f", "default": None}]}
    columns = {name: [value] for name, value in row.items()}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    [found] = read(DataFile("dataset", str(tmp_path / "saved")))
    assert found.columns == row, "as it is in the file"
    assert found.left_out == () and found.padded == ("prompt",)
