"""Prepares the prompts of a run, once, with Ray Data, as one file that every worker can memory-map."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrlhf.config.data import PromptDataConfig, SourceConfig
from rayrlhf.data.chat import (
    decode_prompt,
    prompt_tokenizer,
    read_chat_template,
    render_prompt,
    render_text,
)
from rayrlhf.data.row_filter import REPORT_FIELDS, Policy, Tally, left_out_notes, with_left_out
from rayrlhf.data.rows.padding import without_padding
from rayrlhf.data.rows.prompt_rows import prompt_columns
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.sources.files import Split
from rayrlhf.data.sources.source import read_sources
from rayrlhf.data.sources.spool import spooled
from rayrlhf.data.store import PROMPT_FIELDS, PromptStore, write_store

RENDERED_SCHEMA = pa.schema([*REPORT_FIELDS, *PROMPT_FIELDS])
NOT_RENDERED = {"num_tokens": 0, "prompt_ids": [], "prompt": "", "columns_json": ""}


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
    out_path = Path(out_path)
    renderer = _Renderer(config, tokenizer_path, trust_remote_code, read_chat_template(config), as_texts)
    policy = Policy(
        noun="prompts",
        on_bad_row=config.on_bad_row,
        on_long=config.on_long_prompt,
        max_tokens=config.max_prompt_tokens,
        max_tokens_key="data.max_prompt_tokens",
        on_long_fix="data.on_long_prompt to drop or truncate",
    )
    tally = Tally(policy, [0] * len(sources), contents=("prompt_ids", "columns_json"))
    copies = out_path.parent / "hub"
    with spooled(
        lambda: read_sources(sources, split, copies=copies), renderer, RENDERED_SCHEMA, tally, out_path
    ) as rows:
        tally.check_rows_left(sources, split)
        order = tally.row_order(sources, seed)
        write_store(rows, order, tally.counts(order), tally.fingerprint(order), out_path)
    return PromptStore.open(out_path)


@dataclass(frozen=True)
class _Renderer:
    """Ray Data stage: raw rows -> rendered and tokenised rows. Bad rows are kept, with their problem."""

    config: PromptDataConfig
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None
    as_texts: bool

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            tokenizer = prompt_tokenizer(self.tokenizer_path, self.trust_remote_code, self.chat_template)
            rows = [self._render(row, tokenizer) for row in batch.to_pylist()]
        except DataError as error:  # not specific to one row, so without file and row number
            rows = [{**NOT_RENDERED, "source": 0, "place": "", "problem": str(error), "notes": []}]
        return pa.Table.from_pylist(rows, RENDERED_SCHEMA)

    def _render(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        rendered = {
            **NOT_RENDERED,
            "source": row["source"],
            "place": f"{row['_file']}:{row['_row']}" if row["_row"] else "",
            "problem": row["problem"],
            "notes": left_out_notes(row["left_out"]),
        }
        if row["problem"]:
            return rendered
        columns = json.loads(row["columns_json"])
        # Only the columns of the prompt; reward functions receive their columns unchanged.
        padded = set(json.loads(row["padded"])) & set(prompt_columns(self.config))
        columns = without_padding(columns, padded)
        render = render_text if self.as_texts else render_prompt
        try:
            found = render(columns, self.config, tokenizer)
        except BadRow as error:
            return {**rendered, "problem": with_left_out(str(error), row["left_out"])}
        prompt, prompt_ids = found.text, found.ids
        num_tokens = len(prompt_ids)
        if num_tokens > self.config.max_prompt_tokens and self.config.on_long_prompt == "truncate":
            # The end is kept: it contains the question and the generation prompt.
            prompt_ids = prompt_ids[-self.config.max_prompt_tokens :]
            prompt = decode_prompt(prompt_ids, tokenizer)
        return {
            **rendered,
            "num_tokens": num_tokens,
            "prompt_ids": prompt_ids,
            "prompt": prompt,
            "columns_json": json.dumps(columns) if padded else row["columns_json"],
            "notes": [*rendered["notes"], *found.notes],
        }
