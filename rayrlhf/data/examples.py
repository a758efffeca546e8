"""Prepares the examples of a supervised run, once, with Ray Data, as one file that workers memory-map."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayrlhf.config.data import SourceConfig
from rayrlhf.config.example_data import ExampleDataConfig, KtoDataConfig, PrmDataConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.example_store import EXAMPLE_SCHEMA, SEQUENCE_FIELDS, ExampleStore
from rayrlhf.data.render import RenderedExample, render_example, step_token_id
from rayrlhf.data.row_filter import REPORT_FIELDS, Policy, Tally, left_out_notes, with_left_out
from rayrlhf.data.rows.formats import id_of, normal_form
from rayrlhf.data.rows.mismatch import mismatched, with_mismatched
from rayrlhf.data.rows.padding import without_padding
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.sources.files import Split
from rayrlhf.data.sources.split import in_split
from rayrlhf.data.store import STORE_BATCH_ROWS, ArrowRows, write_tables

RENDERED_SCHEMA = pa.schema(
    [
        *REPORT_FIELDS,
        pa.field("id", pa.string()),  # empty if duplicates are not checked
        pa.field("prompt_tokens", pa.int64()),  # of the first sequence
        *SEQUENCE_FIELDS,
    ]
)
NOT_RENDERED = {
    "num_tokens": 0,
    "id": "",
    "prompt_tokens": 0,
    "input_ids": [],
    "loss_mask": [],
    "targets": [],
    "value": 0.0,
}
CONTENTS = ("input_ids", "loss_mask", "targets", "value")


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
    from rayrlhf.data.sources.spool import spooled

    out_path = Path(out_path)
    chat_template = read_chat_template(config)
    if isinstance(config, PrmDataConfig):
        step_token_id(config.step_token, prompt_tokenizer(tokenizer_path, trust_remote_code, chat_template))
    stage = RenderStage(config, tokenizer_path, trust_remote_code, chat_template, split, seed)
    tally = Tally(policy_of(config), [0] * len(sources), CONTENTS)
    files_of: Split = "train" if config.eval_share else split
    names = config.train_split if files_of == "train" else config.eval_split
    with spooled(
        lambda: read_sources(sources, files_of, names, copies=out_path.parent / "hub"),
        stage,
        RENDERED_SCHEMA,
        tally,
        out_path,
    ) as rows:
        tally.check_rows_left(sources, split)
        order = tally.row_order(sources, seed, config.mixing_stops)
        counts = {**tally.counts(order), "duplicates": tally.repeated.count}
        partners = None
        if isinstance(config, KtoDataConfig):
            partners = mismatched(rows, order, [seed, ("train", "eval").index(split)])
        fingerprint = tally.fingerprint(order, partners)
        tables = _stored(rows, order, partners, config.max_tokens)
        write_tables(tables, EXAMPLE_SCHEMA, counts, fingerprint, out_path)
    return ExampleStore.open(out_path)


def policy_of(config: ExampleDataConfig) -> Policy:
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


@dataclass(frozen=True)
class RenderStage:
    """Ray Data stage: raw rows -> sequences with loss masks. Rows of the other split are dropped."""

    config: ExampleDataConfig
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None
    split: Split
    seed: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        try:
            tokenizer = prompt_tokenizer(self.tokenizer_path, self.trust_remote_code, self.chat_template)
            for row in batch.to_pylist():
                if in_split(row["columns_json"], self.split, self.config.eval_share, self.seed):
                    rows.append(self._render(row, tokenizer))
        except DataError as error:  # not specific to one row, so without file and row number
            rows = [{**NOT_RENDERED, "source": 0, "place": "", "problem": str(error), "notes": []}]
        return pa.Table.from_pylist(rows, RENDERED_SCHEMA)

    def _render(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        place = f"{row['_file']}:{row['_row']}" if row["_row"] else ""
        rendered = {
            **NOT_RENDERED,
            "source": row["source"],
            "place": place,
            "problem": row["problem"],
            "notes": left_out_notes(row["left_out"]),
        }
        if row["problem"]:
            return rendered
        try:
            columns = json.loads(row["columns_json"])
            columns = without_padding(columns, json.loads(row["padded"]))
            example = render_example(normal_form(columns, self.config), self.config, tokenizer)
            notes = [*rendered["notes"], *example.notes]
            return {**rendered, **_columns_of(example), "id": id_of(columns, self.config), "notes": notes}
        except BadRow as error:
            return {**rendered, "problem": with_left_out(str(error), row["left_out"])}
        except DataError as error:
            raise DataError(f"{place}: {error}") from error


def _columns_of(example: RenderedExample) -> dict[str, Any]:
    return {
        "num_tokens": example.num_tokens,
        "prompt_tokens": example.sequences[0].prompt_tokens,
        "input_ids": [sequence.input_ids for sequence in example.sequences],
        "loss_mask": [sequence.loss_mask for sequence in example.sequences],
        "targets": [sequence.targets for sequence in example.sequences],
        "value": example.value,
    }


def _stored(
    rows: ArrowRows, order: np.ndarray, partners: np.ndarray | None, max_tokens: int
) -> Iterator[pa.Table]:
    """The rows in the given order, with the columns of the store; with `partners`, also a second sequence."""
    for start in range(0, len(order), STORE_BATCH_ROWS):
        part = slice(start, start + STORE_BATCH_ROWS)
        table = rows.take(order[part])
        if partners is not None:
            table = with_mismatched(table, rows.take(order[partners[part]]), max_tokens)
        lengths = [sum(map(len, masks)) for masks in table.column("loss_mask").to_pylist()]
        table = table.drop_columns(["num_tokens"])
        yield table.append_column("num_tokens", pa.array(lengths, pa.int64()))
