"""Prepares the prompts of a run once, with Ray Data, into one file that every worker can memory-map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayrlhf.config.data import PromptDataConfig, SourceConfig
from rayrlhf.data.chat import decode_prompt, prompt_tokenizer, read_chat_template, render_prompt
from rayrlhf.data.checks import on_bad_row_fix
from rayrlhf.data.files import Split
from rayrlhf.data.rows import MAX_SHOWN, BadRow, DataError, describe_bad_rows
from rayrlhf.data.sources import READ_TASK_CPUS, mixing_order, ordered_and_quiet, read_sources
from rayrlhf.data.store import PROMPT_FIELDS, ArrowRows, PromptStore, write_store

logger = logging.getLogger(__name__)

RENDER_BATCH_ROWS = 256
RENDERED_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int64()),
        pa.field("place", pa.string()),  # file:row
        pa.field("problem", pa.string()),  # empty for a good row
        pa.field("num_tokens", pa.int64()),  # before truncation
        *PROMPT_FIELDS,
    ]
)
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
) -> PromptStore:
    """Reads, renders, tokenises and, where sources have probabilities, mixes; writes the store at `out_path`.

    The order of the rows depends on the sources and the seed only. Ray must be running; the tokenizer is
    loaded once per worker process. The file appears under its name only when it is complete. Raises
    `DataError` for bad rows and for prompts longer than `max_prompt_tokens` (unless the config says to leave
    them out or to cut them), for files that cannot be read, and where no row is left.
    """
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    renderer = _Renderer(config, tokenizer_path, trust_remote_code, read_chat_template(config))
    spool_path = out_path.with_name(out_path.name + ".rendered")
    tally = _Tally(rows_of_source=[0] * len(sources))
    try:
        with ordered_and_quiet(), pa.OSFile(str(spool_path), "wb") as sink:
            rendered = read_sources(sources, split).map_batches(
                renderer, batch_size=RENDER_BATCH_ROWS, batch_format="pyarrow", num_cpus=READ_TASK_CPUS
            )
            with pa.ipc.new_file(sink, RENDERED_SCHEMA) as writer:
                for batch in rendered.iter_batches(batch_size=None, batch_format="pyarrow"):
                    writer.write_table(_usable_rows(batch, config, tally))
        tally.log()
        _check_rows_left(tally, sources, split)
        order = _row_order(sources, tally, seed)
        write_store(ArrowRows(spool_path), order, tally.counts(order), tally.fingerprint(order), out_path)
    finally:
        spool_path.unlink(missing_ok=True)
    return PromptStore.open(out_path)


@dataclass(frozen=True)
class _Renderer:
    """The Ray Data stage: rows as read -> rows as the model sees them. Bad rows pass with their problem."""

    config: PromptDataConfig
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            tokenizer = prompt_tokenizer(self.tokenizer_path, self.trust_remote_code, self.chat_template)
            rows = [self._render(row, tokenizer) for row in batch.to_pylist()]
        except DataError as error:  # no matter of a single row: it has no place
            rows = [{**NOT_RENDERED, "source": 0, "place": "", "problem": str(error)}]
        return pa.Table.from_pylist(rows, RENDERED_SCHEMA)

    def _render(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        rendered = {
            **NOT_RENDERED,
            "source": row["source"],
            "place": f"{row['_file']}:{row['_row']}" if row["_row"] else "",
            "problem": row["problem"],
        }
        if row["problem"]:
            return rendered
        columns = json.loads(row["columns_json"])
        try:
            prompt, prompt_ids = render_prompt(columns, self.config, tokenizer)
        except BadRow as error:
            return {**rendered, "problem": str(error)}
        num_tokens = len(prompt_ids)
        if num_tokens > self.config.max_prompt_tokens and self.config.on_long_prompt == "truncate":
            # The end is kept: it holds the question and the opening of the assistant's turn.
            prompt_ids = prompt_ids[-self.config.max_prompt_tokens :]
            prompt = decode_prompt(prompt_ids, tokenizer)
        return {
            **rendered,
            "num_tokens": num_tokens,
            "prompt_ids": prompt_ids,
            "prompt": prompt,
            "columns_json": row["columns_json"],
        }


@dataclass
class _Tally:
    """What became of the rows, and a hash of those that are kept."""

    rows_of_source: list[int]
    skipped_bad: int = 0
    dropped_long: int = 0
    truncated: int = 0
    shown: list[str] = field(default_factory=list)  # the first bad rows
    # Lengths and contents apart, so that the hash does not depend on how the rows came in batches.
    digests: list[Any] = field(default_factory=lambda: [hashlib.sha256() for _ in range(4)])

    def keep(self, rows: pa.Table) -> None:
        for source in rows.column("source").to_pylist():
            self.rows_of_source[source] += 1
        for batch in rows.to_batches():
            prompt_ids = batch.column("prompt_ids")
            columns = [text.encode() for text in batch.column("columns_json").to_pylist()]
            contents = [
                prompt_ids.value_lengths().to_numpy().tobytes(),
                prompt_ids.flatten().to_numpy().tobytes(),
                np.array([len(text) for text in columns], dtype="<i8").tobytes(),
                b"".join(columns),
            ]
            for digest, content in zip(self.digests, contents, strict=True):
                digest.update(content)

    def fingerprint(self, order: np.ndarray) -> str:
        whole = hashlib.sha256(order.astype("<i8").tobytes())
        for digest in self.digests:
            whole.update(digest.digest())
        return whole.hexdigest()

    def counts(self, order: np.ndarray) -> dict[str, int]:
        return {
            "rows": len(order),
            "skipped_bad": self.skipped_bad,
            "dropped_long": self.dropped_long,
            "truncated": self.truncated,
            "unused_by_mixing": sum(self.rows_of_source) - len(order),
        }

    def log(self) -> None:
        if self.skipped_bad:
            logger.warning(
                "skipped %d bad rows (data.on_bad_row=skip)\n%s",
                self.skipped_bad,
                describe_bad_rows(self.shown, self.skipped_bad),
            )
        if self.dropped_long:
            logger.warning("dropped %d prompts longer than data.max_prompt_tokens", self.dropped_long)
        if self.truncated:
            logger.warning(
                "cut the beginning off %d prompts longer than data.max_prompt_tokens", self.truncated
            )


def _usable_rows(batch: pa.Table, config: PromptDataConfig, tally: _Tally) -> pa.Table:
    """Applies `on_bad_row` and `on_long_prompt` and counts. Raises `DataError` where they say "fail"."""
    problems = batch.column("problem").to_pylist()
    lengths = batch.column("num_tokens").to_pylist()
    places = batch.column("place").to_pylist()
    of_no_row = [problem for place, problem in zip(places, problems, strict=True) if problem and not place]
    if of_no_row:
        raise DataError(of_no_row[0])
    bad = [f"{place}: {problem}" for place, problem in zip(places, problems, strict=True) if problem]
    long = [index for index, length in enumerate(lengths) if length > config.max_prompt_tokens]
    if bad and config.on_bad_row == "fail":
        raise DataError(f"rows that cannot be used\n{describe_bad_rows(bad)}\n{on_bad_row_fix()}")
    if long and config.on_long_prompt == "fail":
        described = [f"{places[index]}: {lengths[index]} tokens" for index in long]
        raise DataError(
            f"prompts longer than data.max_prompt_tokens={config.max_prompt_tokens}\n"
            f"{describe_bad_rows(described)}\nraise data.max_prompt_tokens to {max(lengths)} or more, "
            "or set data.on_long_prompt to drop or truncate"
        )
    tally.skipped_bad += len(bad)
    tally.shown += bad[: MAX_SHOWN - len(tally.shown)]
    keep = np.array([not problem for problem in problems])
    if config.on_long_prompt == "drop":
        keep[long] = False
        tally.dropped_long += len(long)
    else:
        tally.truncated += len(long)
    kept = batch.filter(pa.array(keep))
    tally.keep(kept)
    return kept


def _check_rows_left(tally: _Tally, sources: Sequence[SourceConfig], split: Split) -> None:
    empty = [
        f"data.{split}[{index}]={source.path}"
        for index, source in enumerate(sources)
        if tally.rows_of_source[index] == 0
    ]
    if empty and (len(empty) == len(sources) or sources[0].probability is not None):
        raise DataError(
            f"no usable row in {', '.join(empty)} ({tally.skipped_bad} bad rows skipped, "
            f"{tally.dropped_long} long prompts dropped); "
            "check the files, data.prompt_key and data.max_prompt_tokens"
        )


def _row_order(sources: Sequence[SourceConfig], tally: _Tally, seed: int) -> np.ndarray:
    probabilities = [source.probability for source in sources if source.probability is not None]
    if not probabilities:
        return np.arange(sum(tally.rows_of_source))
    order = mixing_order(tally.rows_of_source, probabilities, seed)
    unused = sum(tally.rows_of_source) - len(order)
    if unused:
        logger.info("mixing by probability leaves %d rows unused, so that proportions hold", unused)
    return order
