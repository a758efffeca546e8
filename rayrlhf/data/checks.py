"""Quick checks of the data, within a second, before anything starts: no Ray and no torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from rayrlhf.config.data import DataConfig, PromptDataConfig, SourceConfig
from rayrlhf.config.example_data import ExampleDataConfig
from rayrlhf.data.rows.formats import id_of, normal_form
from rayrlhf.data.rows.padding import without_padding
from rayrlhf.data.rows.prompt_rows import prompt_of
from rayrlhf.data.rows.row import BadRow, DataError, RawRow, describe_bad_rows
from rayrlhf.data.sources.files import DataFile, Split, resolve_source
from rayrlhf.data.sources.readers import plan_chunks, read_chunk

HEAD_ROWS = 1000  # rows checked per file
TOTAL_ROWS = 20_000  # … and in all, so that a data set of a thousand files is checked quickly too
MAX_JSON_ARRAY_BYTES = 64 << 20  # a JSON array can only be read whole; larger ones are checked when prepared


def check_sources(config: PromptDataConfig) -> None:
    """Raises one `DataError` that lists all problems of the files in the section `data`.

    Paths that do not exist, unknown types, files without rows, rows in the head of each file that do not
    parse or have no usable prompt or label. With `on_bad_row: skip` bad rows are reported only if no row is
    usable. Problems further down in the files are found when they are prepared.
    """
    _check(config, lambda row: row_problem(row, config), {"train": None, "eval": None})


def check_example_sources(config: ExampleDataConfig) -> None:
    """`check_sources` for supervised training: every row must have a normal form."""
    names: dict[Split, str | None] = {"train": config.train_split, "eval": config.eval_split}
    _check(config, lambda row: example_problem(row, config), names)


RowProblem = Callable[[RawRow], str]


def _check(config: DataConfig, problem_of: RowProblem, split_names: Mapping[Split, str | None]) -> None:
    problems = []
    if config.chat_template is not None and not os.path.isfile(config.chat_template):
        problems.append(f"data.chat_template={config.chat_template}: no such file; wanted a Jinja template")
    splits: list[tuple[Split, Sequence[SourceConfig]]] = [("train", config.train), ("eval", config.eval)]
    for split, sources in splits:
        for index, source in enumerate(sources):
            problem = _source_problem(source.path, split, split_names[split], config.on_bad_row, problem_of)
            if problem:
                problems.append(f"data.{split}[{index}]: {problem}")
    if problems:
        raise DataError("\n".join(problems))


def _source_problem(
    path: str, split: Split, split_name: str | None, on_bad_row: str, problem_of: RowProblem
) -> str:
    try:
        files = resolve_source(path, split, split_name)
        budget = max(10, min(HEAD_ROWS, TOTAL_ROWS // len(files)))
        heads = [head_rows(file, budget) for file in files]
    except DataError as error:
        return str(error)
    rows = [row for head in heads if head is not None for row in head]
    if not rows and None not in heads:
        return f"{path} holds no rows; wanted at least one"
    bad = [f"{row.place}: {problem}" for row in rows if (problem := problem_of(row))]
    if not bad or (on_bad_row == "skip" and len(bad) < len(rows)):
        return ""
    if len(bad) == len(rows) and on_bad_row == "skip":
        return f"{path} has no usable row among the first {len(rows)}\n{describe_bad_rows(bad)}"
    return f"{path} has rows that cannot be used\n{describe_bad_rows(bad)}\n{on_bad_row_fix()}"


def head_rows(file: DataFile, rows: int) -> Sequence[RawRow] | None:
    """The first rows of a file; None if they cannot be read quickly."""
    if file.type == "json" and os.path.getsize(file.path) > MAX_JSON_ARRAY_BYTES:
        return None
    return list(islice((row for chunk in plan_chunks(file) for row in read_chunk(chunk)), rows))


def row_problem(row: RawRow, config: PromptDataConfig) -> str:
    """Why a row cannot be used, as far as can be checked without a tokenizer; empty for a good row."""
    if row.problem:
        return row.problem
    try:
        prompt_of(without_padding(row.columns, row.padded), config)
    except BadRow as error:
        return str(error)
    return ""


def example_problem(row: RawRow, config: ExampleDataConfig) -> str:
    """`row_problem` for supervised training."""
    if row.problem:
        return row.problem
    try:
        normal_form(without_padding(row.columns, row.padded), config)
        id_of(row.columns, config)
    except BadRow as error:
        return str(error)
    return ""


def on_bad_row_fix() -> str:
    return "fix the rows, or skip them with data.on_bad_row=skip"
