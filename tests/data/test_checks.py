"""What is found before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.checks import HEAD_ROWS, check_sources
from rayrlhf.data.rows.row import DataError

GOOD = '{"prompt": "a", "label": "b"}\n'


def config_of(train: Any, **fields: Any) -> PromptDataConfig:
    return PromptDataConfig.model_validate({"train": train, **fields})


def message(train: Any, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        check_sources(config_of(train, **fields))
    return str(caught.value)


def test_good_sources_pass(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD * 3)
    (tmp_path / "test.jsonl").write_text(GOOD)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    given: dict[str, Any] = {
        "eval": str(tmp_path),
        "label_key": "label",
        "chat_template": str(tmp_path / "chat.jinja"),
    }
    check_sources(config_of(f"jsonl@{tmp_path}", **given))
    (tmp_path / "test.jsonl").write_text(GOOD + "[1]\n")
    assert "test.jsonl:2" in message(f"jsonl@{tmp_path}", **given), "it has read the second file too"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + '{"prompt": \n' + "[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    error = message(
        [f"{tmp_path}/a.jsonl", f"{tmp_path}/empty.jsonl"],
        eval=f"{tmp_path}/none.csv",
        chat_template=f"{tmp_path}/none.jinja",
    )
    assert f"{tmp_path}/a.jsonl:2: not valid JSON" in error
    assert f"{tmp_path}/a.jsonl:3: an array, not an object" in error
    assert "data.on_bad_row=skip" in error
    assert f"data.train[1]: {tmp_path}/empty.jsonl holds no rows" in error
    assert f"data.eval[0]: {tmp_path}/none.csv: no such file" in error
    assert f"data.chat_template={tmp_path}/none.jinja: no such file" in error


def test_missing_columns_are_named_with_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    path = f"{tmp_path}/a.jsonl"
    assert f"{path}:1: no column 'question' (data.prompt_key)" in message(path, prompt_key="question")
    error = message(path, label_key="answer")
    assert "no column 'answer' (data.label_key); the columns are: 'prompt', 'label'" in error


def test_skipping_bad_rows_needs_one_good_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n" * 9 + GOOD)
    check_sources(config_of(str(path), on_bad_row="skip"))
    path.write_text("[1]\n" * 9)
    assert "no usable row among the first 9" in message(str(path), on_bad_row="skip")


def test_a_header_alone_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,label\n")
    assert "holds no rows" in message(f"{tmp_path}/a.csv")


def test_only_the_head_of_a_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * HEAD_ROWS + "broken\n")
    check_sources(config_of(str(path)))
    path.write_text(GOOD * (HEAD_ROWS - 1) + "broken\n")
    assert f"{path}:{HEAD_ROWS}: not valid JSON" in message(str(path))


def test_every_file_of_a_folder_is_looked_at(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": ""}))
    assert f"{tmp_path}/b.jsonl:1: column 'prompt' is empty" in message(str(tmp_path))


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    script = (
        "import sys; from rayrlhf.config.data import PromptDataConfig; "
        "from rayrlhf.data.checks import check_sources; "
        "check_sources(PromptDataConfig.model_validate({'train': sys.argv[1]})); "
        "print(sorted({'ray', 'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, f"{tmp_path}/a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_examples_are_checked_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    script = (
        "import sys; from rayrlhf.config.example_data import SftDataConfig; "
        "from rayrlhf.data.checks import check_example_sources; "
        "check_example_sources(SftDataConfig.model_validate({'train': sys.argv[1]})); "
        "print(sorted({'ray', 'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, f"{tmp_path}/a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"
