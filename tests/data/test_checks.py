import json
import subprocess
import sys
import time

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.checks import check_sources
from rayrlhf.data.rows import DataError


@pytest.fixture
def lines(tmp_path):
    """Writes lines (objects as JSON) to a file and returns its path."""

    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def config(train, **options):
    return PromptDataConfig.model_validate({"train": train, **options})


def test_good_data_passes(lines):
    train = lines(
        "train.jsonl",
        {"prompt": "a", "answer": 1},
        {"prompt": [{"role": "user", "content": "b"}], "answer": 2},
    )
    check_sources(config(train, eval=[train], label_key="answer"))


def test_everything_wrong_is_said_at_once(lines, tmp_path):
    broken = lines("broken.jsonl", {"prompt": "a"}, "{oops", {"prompt": ""})
    renamed = lines("renamed.jsonl", {"question": "a", "id": 1})
    with pytest.raises(DataError) as raised:
        check_sources(
            config([broken, f"{tmp_path}/gone.jsonl"], eval=renamed, chat_template=f"{tmp_path}/gone.jinja")
        )
    message = str(raised.value)
    assert f"data.chat_template={tmp_path}/gone.jinja: no such file" in message
    assert f"data.train[0]: {broken} has rows that cannot be used" in message
    assert f"{broken}:2: not valid JSON" in message
    assert f"{broken}:3: column 'prompt' is empty" in message
    assert "data.on_bad_row=skip" in message
    assert f"data.train[1]: {tmp_path}/gone.jsonl: no such file or folder" in message
    assert f"data.eval[0]: {renamed} has rows" in message
    assert "no column 'prompt' (data.prompt_key); the columns are: 'question', 'id'" in message


def test_bad_rows_may_be_skipped_while_some_are_good(lines):
    some = lines("some.jsonl", "{oops", {"prompt": "a"})
    check_sources(config(some, on_bad_row="skip"))
    none = lines("none.jsonl", "{oops", {"text": "a"})
    with pytest.raises(DataError, match="no usable row among the first 2"):
        check_sources(config(none, on_bad_row="skip"))


def test_files_without_rows(lines):
    with pytest.raises(DataError, match="holds no rows"):
        check_sources(config(lines("empty.jsonl")))
    with pytest.raises(DataError, match="holds no rows"):
        check_sources(config(lines("header.csv", "prompt,label")))


def test_a_missing_label_column(lines):
    with pytest.raises(DataError, match=r"no column 'label' \(data.label_key\); the columns are: 'prompt'"):
        check_sources(config(lines("a.jsonl", {"prompt": "a"}), label_key="label"))


def test_only_the_head_of_a_large_file_is_read(lines):
    rows = ['{"prompt": "' + "x" * 1000 + '"}'] * 60_000
    large = lines("large.jsonl", *rows, "{oops")
    start = time.monotonic()
    check_sources(config(large))
    assert time.monotonic() - start < 0.5


def test_the_check_needs_no_heavy_import(lines):
    """In a process of its own, since this one has imported them."""
    program = (
        "import sys\n"
        "from rayrlhf.config.data import PromptDataConfig\n"
        "from rayrlhf.data.checks import check_sources\n"
        "check_sources(PromptDataConfig.model_validate({'train': sys.argv[1]}))\n"
        "heavy = {'ray', 'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = lines("a.jsonl", {"prompt": "a"})
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=60)
