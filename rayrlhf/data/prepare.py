"""Prepares the rows of a run once, with Ray Data, into one file that every worker can memory-map.

Prompts and examples take the same way: read the sources, render and tokenise each row in a Ray Data stage,
filter and count (`row_filter.Tally`), mix, write the store. They differ in their row type: `PromptRows` and
`ExampleRows`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from rayrlhf.config.data import PromptDataConfig, SourceConfig
from rayrlhf.config.example_data import ExampleDataConfig, KtoDataConfig, PrmDataConfig
from rayrlhf.data.chat import decode_prompt, prompt_tokenizer, read_chat_template, render_prompt, render_text
from rayrlhf.data.images import ImageReader, check_not_cut, folder_of, image_reader
from rayrlhf.data.render import RenderedExample, render_example, step_token_id
from rayrlhf.data.row_filter import REPORT_FIELDS, Policy, Tally, left_out_notes, with_left_out
from rayrlhf.data.rows.formats import id_of, normal_form
from rayrlhf.data.rows.images import without_contents
from rayrlhf.data.rows.mismatch import mismatched, with_mismatched
from rayrlhf.data.rows.padding import without_padding
from rayrlhf.data.rows.prompt_rows import prompt_columns
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.sources.files import Split
from rayrlhf.data.sources.split import in_split
from rayrlhf.data.store import (
    EXAMPLE_SCHEMA,
    IMAGE_BATCH_ROWS,
    PROMPT_FIELDS,
    PROMPT_SCHEMA,
    SEQUENCE_FIELDS,
    STORE_BATCH_ROWS,
    ArrowRows,
    ExampleStore,
    PromptStore,
    in_order,
    write_tables,
)
from rayrlhf.samples import EncodedImage


@dataclass(frozen=True)
class PromptRows:
    """Rows that become prompts, or with `as_texts` texts to be trained on unchanged (`data.ptx`)."""

    config: PromptDataConfig
    as_texts: bool = False

    schema: ClassVar[pa.Schema] = pa.schema([*REPORT_FIELDS, *PROMPT_FIELDS])
    empty: ClassVar[dict[str, Any]] = {
        "num_tokens": 0,
        "prompt_ids": [],
        "prompt": "",
        "columns_json": "",
        "images": [],
        "image_tokens": [],
    }
    contents: ClassVar[tuple[str, ...]] = ("prompt_ids", "columns_json", "images")

    @property
    def policy(self) -> Policy:
        return Policy(
            noun="prompts",
            on_bad_row=self.config.on_bad_row,
            on_long=self.config.on_long_prompt,
            max_tokens=self.config.max_prompt_tokens,
            max_tokens_key="data.max_prompt_tokens",
            on_long_fix="data.on_long_prompt to drop or truncate",
        )

    def has(self, row: Mapping[str, Any]) -> bool:
        return True

    def render(
        self, row: Mapping[str, Any], tokenizer: Any, reader: ImageReader | None
    ) -> tuple[dict[str, Any], Sequence[str]]:
        """The columns of `schema` and notes on what was changed. Raises `BadRow` or `DataError`."""
        columns = json.loads(row["columns_json"])
        # Only the columns of the prompt; reward functions receive their columns unchanged.
        padded = set(json.loads(row["padded"])) & set(prompt_columns(self.config))
        columns = without_padding(columns, padded)
        if self.as_texts:
            text, ids, notes, images = render_text(columns, self.config, tokenizer)
        else:
            folder = folder_of(row["_file"])
            text, ids, notes, images = render_prompt(columns, self.config, tokenizer, reader, folder)
        num_tokens = len(ids)
        if num_tokens > self.config.max_prompt_tokens and self.config.on_long_prompt == "truncate":
            # The end is kept: it contains the question and the generation prompt.
            ids = ids[-self.config.max_prompt_tokens :]
            text = decode_prompt(ids, tokenizer)
            if reader is not None and images:
                limit = f"data.max_prompt_tokens={self.config.max_prompt_tokens}"
                check_not_cut(ids, images, reader.image_token_id, limit)
        columns_json = row["columns_json"]
        if padded or ";base64," in columns_json:
            columns_json = json.dumps(without_contents(columns))
        return {
            "num_tokens": num_tokens,
            "prompt_ids": ids,
            "prompt": text,
            "columns_json": columns_json,
            **_image_columns(images),
        }, notes


@dataclass(frozen=True)
class ExampleRows:
    """Rows that become sequences with loss masks, of one split."""

    config: ExampleDataConfig
    split: Split
    seed: int

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *REPORT_FIELDS,
            pa.field("id", pa.string()),  # empty where rows are not compared
            pa.field("prompt_tokens", pa.int64()),  # of the first sequence
            *SEQUENCE_FIELDS,
        ]
    )
    empty: ClassVar[dict[str, Any]] = {
        "num_tokens": 0,
        "id": "",
        "prompt_tokens": 0,
        "input_ids": [],
        "loss_mask": [],
        "targets": [],
        "value": 0.0,
        "images": [],
        "image_tokens": [],
    }
    contents: ClassVar[tuple[str, ...]] = ("input_ids", "loss_mask", "targets", "value", "images")

    @property
    def policy(self) -> Policy:
        config = self.config
        return Policy(
            noun="examples",
            on_bad_row=config.on_bad_row,
            on_long=config.on_long if config.on_long in ("fail", "drop") else "truncate",
            max_tokens=config.max_tokens,
            max_tokens_key="data.max_tokens",
            on_long_fix="data.on_long to drop, truncate_head or truncate_tail",
            cut="the end" if config.on_long == "truncate_tail" else "the beginning",
            on_duplicate_id=config.on_duplicate_id,
        )

    def has(self, row: Mapping[str, Any]) -> bool:
        """With `eval_share` a hash of the row decides."""
        return in_split(row["columns_json"], self.split, self.config.eval_share, self.seed)

    def render(
        self, row: Mapping[str, Any], tokenizer: Any, reader: ImageReader | None
    ) -> tuple[dict[str, Any], Sequence[str]]:
        """The columns of `schema` and notes on what was changed. Raises `BadRow` or `DataError`."""
        columns = without_padding(json.loads(row["columns_json"]), json.loads(row["padded"]))
        try:
            found, folder = normal_form(columns, self.config), folder_of(row["_file"])
            example = render_example(found, self.config, tokenizer, reader, folder)
        except DataError as error:
            raise DataError(f"{_place(row)}: {error}") from error
        return {**_columns_of(example), "id": id_of(columns, self.config)}, example.notes


@dataclass(frozen=True)
class RenderStage:
    """Ray Data stage: raw rows -> rendered and tokenised rows. Bad rows are kept, with their problem."""

    rows: PromptRows | ExampleRows
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            tokenizer = prompt_tokenizer(self.tokenizer_path, self.trust_remote_code, self.chat_template)
            timeout_seconds = self.rows.config.image_timeout_seconds
            reader = image_reader(self.tokenizer_path, self.trust_remote_code, timeout_seconds)
            rows = [row for row in batch.to_pylist() if self.rows.has(row)]
            rendered = [self._render(row, tokenizer, reader) for row in rows]
        except DataError as error:  # not specific to one row, so without file and row number
            report = {"source": 0, "place": "", "problem": str(error), "notes": []}
            rendered = [{**self.rows.empty, **report}]
        return pa.Table.from_pylist(rendered, self.rows.schema)

    def _render(self, row: dict[str, Any], tokenizer: Any, reader: ImageReader | None) -> dict[str, Any]:
        notes = left_out_notes(row["left_out"])
        report = {"source": row["source"], "place": _place(row), "problem": row["problem"], "notes": notes}
        if row["problem"]:
            return {**self.rows.empty, **report}
        try:
            columns, more_notes = self.rows.render(row, tokenizer, reader)
        except BadRow as error:
            problem = with_left_out(str(error), row["left_out"])
            return {**self.rows.empty, **report, "problem": problem}
        return {**report, **columns, "notes": [*notes, *more_notes]}


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['_file']}:{row['_row']}" if row["_row"] else ""


def prepare_prompts(
    sources: Sequence[SourceConfig],
    config: PromptDataConfig,
    tokenizer_path: str,
    out_path: str | os.PathLike[str],
    seed: int,
    split: Split = "train",
    *,
    trust_remote_code: bool = False,
    as_texts: bool = False,
) -> PromptStore:
    """Reads, renders, tokenises and, if sources have probabilities, mixes; writes the store at `out_path`.

    `as_texts`: the column `prompt_key` holds texts to be trained on unchanged (`data.ptx`).

    The order of the rows depends on the sources and the seed only. Ray must be running; the tokenizer is
    loaded once per worker process. The file is written atomically. Raises `DataError` for bad rows and for
    prompts longer than `max_prompt_tokens` (unless the config says to drop or truncate them), for files that
    cannot be read, and if no row is left.
    """
    from rayrlhf.data.sources.source import read_sources
    from rayrlhf.data.sources.spool import RENDER_BATCH_ROWS, spooled

    out_path = Path(out_path)
    rows = PromptRows(config, as_texts)
    stage = RenderStage(rows, tokenizer_path, trust_remote_code, read_chat_template(config))
    tally, batch_rows = Tally(rows.policy, [0] * len(sources), rows.contents), _batch_rows(stage)
    copies = out_path.parent / "hub"
    with spooled(
        lambda: read_sources(sources, split, copies=copies, images_key=config.images_key),
        stage,
        rows.schema,
        tally,
        out_path,
        min(batch_rows, RENDER_BATCH_ROWS),
    ) as rendered:
        tally.check_rows_left(sources, split)
        order = tally.row_order(sources, seed)
        tables = in_order(rendered, order, batch_rows)
        write_tables(tables, PROMPT_SCHEMA, tally.counts(order), tally.fingerprint(order), out_path)
    return PromptStore.open(out_path)


def prepare_examples(
    sources: Sequence[SourceConfig],
    config: ExampleDataConfig,
    tokenizer_path: str,
    out_path: str | os.PathLike[str],
    seed: int,
    split: Split = "train",
    *,
    trust_remote_code: bool = False,
) -> ExampleStore:
    """Reads, renders, masks, tokenises and mixes the rows of a split; writes the store at `out_path`.

    `sources` are `config.sources_of(split)`: with `eval_share` both splits read the training sources, and a
    hash of the row and the seed selects its split, the same in every run and for equal rows. An example of
    KTO gets a second sequence, its prompt with the response to another one (`data.rows.mismatch`).

    The counts have `duplicates` in addition to those of prompts. Ray must be running; the tokenizer is loaded
    once per worker process. Raises `DataError` for bad, long or repeated rows (unless the config says
    otherwise), for an unsuitable tokenizer or template, and if no row is left.
    """
    from rayrlhf.data.sources.source import read_sources
    from rayrlhf.data.sources.spool import RENDER_BATCH_ROWS, spooled

    out_path = Path(out_path)
    rows, chat_template = ExampleRows(config, split, seed), read_chat_template(config)
    if isinstance(config, PrmDataConfig):
        step_token_id(config.step_token, prompt_tokenizer(tokenizer_path, trust_remote_code, chat_template))
    stage = RenderStage(rows, tokenizer_path, trust_remote_code, chat_template)
    tally, batch_rows = Tally(rows.policy, [0] * len(sources), rows.contents), _batch_rows(stage)
    files_of: Split = "train" if config.eval_share else split
    names = config.train_split if files_of == "train" else config.eval_split
    copies = out_path.parent / "hub"
    with spooled(
        lambda: read_sources(sources, files_of, names, copies=copies, images_key=config.images_key),
        stage,
        rows.schema,
        tally,
        out_path,
        min(batch_rows, RENDER_BATCH_ROWS),
    ) as rendered:
        tally.check_rows_left(sources, split)
        order = tally.row_order(sources, seed, config.mixing_stops)
        counts = {**tally.counts(order), "duplicates": tally.repeated.count}
        partners = None
        if isinstance(config, KtoDataConfig):
            partners = mismatched(rendered, order, [seed, ("train", "eval").index(split)])
        fingerprint = tally.fingerprint(order, partners)
        tables = _sequences(rendered, order, partners, config.max_tokens, batch_rows)
        write_tables(tables, EXAMPLE_SCHEMA, counts, fingerprint, out_path)
    return ExampleStore.open(out_path)


def _columns_of(example: RenderedExample) -> dict[str, Any]:
    return {
        "num_tokens": example.num_tokens,
        "prompt_tokens": example.sequences[0].prompt_tokens,
        "input_ids": [sequence.input_ids for sequence in example.sequences],
        "loss_mask": [sequence.loss_mask for sequence in example.sequences],
        "targets": [sequence.targets for sequence in example.sequences],
        "value": example.value,
        **_image_columns(example.images),
    }


def _image_columns(images: Sequence[EncodedImage]) -> dict[str, Any]:
    return {
        "images": [image.content for image in images],
        "image_tokens": [image.num_tokens for image in images],
    }


def _batch_rows(stage: RenderStage) -> int:
    """Rows in memory at a time, fewer where they may have images."""
    reader = image_reader(stage.tokenizer_path, stage.trust_remote_code, 0.0)
    return STORE_BATCH_ROWS if reader is None else IMAGE_BATCH_ROWS


def _sequences(
    rows: ArrowRows, order: np.ndarray, partners: np.ndarray | None, max_tokens: int, batch_rows: int
) -> Iterator[pa.Table]:
    """The rows in the given order, with the columns of the store; with `partners`, also a second sequence."""
    for start in range(0, len(order), batch_rows):
        part = slice(start, start + batch_rows)
        table = rows.take(order[part])
        if partners is not None:
            table = with_mismatched(table, rows.take(order[partners[part]]), max_tokens)
        lengths = [sum(map(len, masks)) for masks in table.column("loss_mask").to_pylist()]
        table = table.drop_columns(["num_tokens"])
        yield table.append_column("num_tokens", pa.array(lengths, pa.int64()))
