"""What `rayrlhf data preview` prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rayrlhf.commands.cli import main
from rayrlhf.commands.data_preview import look_at, packing_fill
from rayrlhf.commands.data_preview_text import histogram, show
from rayrlhf.config.parse import load_config
from rayrlhf.config.supervised import JOBS
from tests.hostile_text import HOSTILE, assert_harmless
from tests.tiny_model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config_path(tmp_path: Path, tokenizer_path: str):
    """Writes rows and the config of a job, whose path is returned."""

    def write(job: str, rows: list[Any], **data: Any) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        values = {
            "job": job,
            "run": {"name": "test"},
            "model": {"path": tokenizer_path},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 16, **data},
            "train": {"max_tokens_per_micro_batch": 64, "samples_per_step": 2},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return str(path)

    return write


ROW = {"prompt": "hi", "response": "be"}  # 9 tokens, of which 3 are loss tokens


def test_masks_counts_lengths_and_packing(config_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**ROW, "id": 0},
        {**ROW, "id": 0},
        "[1]",
        {**ROW, "response": "a" * 20, "id": 3},
        {**ROW, "id": 4},
    ]
    path = config_path("sft", rows, id_key="id", on_long="drop", on_bad_row="skip", on_duplicate_id="skip")
    assert main(["data", "preview", path]) == 0
    output = capsys.readouterr().out
    assert "<s><|user|>hi</s><|assistant|>⟦be</s>⟧\n" in output
    assert "9 tokens, 3 loss tokens" in output and "\x1b" not in output
    assert "5 rows of data.train read, 2 examples" in output
    assert "1 bad: skipped" in output and "rows.jsonl:3: an array, not an object" in output
    assert "1 too long: dropped" in output and "rows.jsonl:4: 27 tokens" in output
    assert "1 with an id seen before: skipped" in output and "rows.jsonl:2: the id 0 is also" in output
    assert "tokens per sequence: 9 to 9, median 9" in output and "33% are loss tokens" in output
    assert "28% full" in output  # two examples of 9 tokens in a micro-batch of 64


@pytest.mark.parametrize("on_bad_row", ["skip", "fail"])
def test_21_rows_that_steer_a_terminal(
    on_bad_row: str, config_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: the text of the rows, and the id of a bad one, were printed raw."""
    rows = [
        {"prompt": HOSTILE, "response": HOSTILE, "id": HOSTILE},
        {"prompt": HOSTILE, "response": HOSTILE, "id": HOSTILE},
        {"prompt": "hi", HOSTILE: "be"},
    ]
    path = config_path(
        "sft", rows, id_key="id", max_tokens=4096, on_duplicate_id="skip", on_bad_row=on_bad_row
    )
    assert main(["data", "preview", path, "train.max_tokens_per_micro_batch=4096"]) == 0
    output = capsys.readouterr()
    assert_harmless(output.out + output.err)
    assert r"\x1b]0;pwned\x07" in output.out and "1 bad" in output.out and "an id seen before" in output.out


def test_a_terminal_has_colours(config_path) -> None:
    config = load_config(JOBS["sft"], [config_path("sft", [ROW])])
    preview = look_at(config.data, make_tokenizer(), 0, "train", 10)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system="standard", highlight=False)
    show(console, preview, config, make_tokenizer(), packing_fill(preview, config), 1)
    assert "\x1b[1;32mbe</s>\x1b[0m" in written.getvalue() and "⟦" not in written.getvalue()


@pytest.mark.parametrize(
    "job, row, data, texts",
    [
        (
            "dpo",
            {"prompt": "hi", "chosen": "be", "rejected": "c", "margin": 2},
            {},
            ["margin 2", "⟦be</s>⟧", "⟦c</s>⟧"],
        ),
        ("kto", {"prompt": "hi", "completion": "be", "label": False}, {}, ["undesirable", "⟦be</s>⟧"]),
        (
            "prm",
            {"prompt": "hi", "steps": ["a", "b"], "labels": [1, 0.5]},
            {"step_token": "<|extra|>"},
            ["a⟦<|extra|>⟧ = 1 b⟦<|extra|>⟧ = 0.5"],
        ),
    ],
)
def test_every_kind_of_example(
    config_path, capsys: pytest.CaptureFixture[str], job: str, row: Any, data: Any, texts: list[str]
) -> None:
    assert main(["data", "preview", config_path(job, [row, row], **data), "--show", "1"]) == 0
    printed = capsys.readouterr().out
    for text in texts:
        assert text in printed
    assert printed.count("rows.jsonl:1") == 1 and "rows.jsonl:2" not in printed


def test_the_number_of_rows_and_the_split(config_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_path("sft", [{**ROW, "n": n} for n in range(50)], eval_share=0.5)
    read = []
    for split in ("train", "eval"):
        assert main(["data", "preview", path, "--rows", "40", "--split", split]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "rows of" in line)
        assert f"data.{split} read" in line
        read.append(int(line.split()[0]))
    assert sum(read) == 40 and all(read)


def test_what_cannot_be_previewed(config_path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = config_path("sft", [ROW])
    assert main(["data", "preview", path, "job=stf"]) == 2
    assert "one of sft, rm, prm, dpo, kto, kd" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["data", "preview", path, "data.max_token=3"])
    assert left.value.code == 2 and "did you mean data.max_tokens?" in capsys.readouterr().err
    assert main(["data", "preview", path, f"data.train={tmp_path}/none.jsonl"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["data", "preview", path, "--split", "eval"]) == 1
    assert "give data.eval or data.eval_share" in capsys.readouterr().err


def test_ray_is_not_started(config_path) -> None:
    path = config_path("sft", [ROW])
    script = (
        "import sys; from rayrlhf.commands.cli import main; main(sys.argv[1:]); print('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "data", "preview", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        ([52] * 4, [("52", 4)]),
        ([124, 127, 127], [("124", 1), ("125", 0), ("126", 0), ("127", 2)]),
        (range(1, 12), [("1 – 2", 2), ("3 – 4", 2), ("5 – 6", 2), ("7 – 8", 2), ("9 – 10", 2), ("11", 1)]),
    ],
)
def test_ranges_of_lengths_hold_whole_numbers_and_none_twice(
    lengths: Any, spans: list[tuple[str, int]]
) -> None:
    lines = [line.rstrip(" █").rpartition(" ") for line in histogram(np.array(lengths))]
    assert [(span.strip(), int(count)) for span, _, count in lines] == spans
