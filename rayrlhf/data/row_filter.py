"""Row filtering during preparation: rows that are dropped, truncated or kept, and their order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayrlhf.config.data import SourceConfig
from rayrlhf.data.checks import on_bad_row_fix
from rayrlhf.data.rows.row import MAX_SHOWN, DataError, describe_bad_rows
from rayrlhf.data.sources.files import Split
from rayrlhf.data.sources.mixing import MixingStops, mixing_order

logger = logging.getLogger(__name__)

# Columns that every stage adds to its own; `place` is file:row, empty if not specific to one row.
REPORT_FIELDS = [
    pa.field("source", pa.int64()),
    pa.field("place", pa.string()),
    pa.field("problem", pa.string()),  # empty for a good row
    pa.field("num_tokens", pa.int64()),  # of the longest sequence, before truncation
    pa.field("notes", pa.list_(pa.string())),  # changes made to the row
]


def left_out_notes(left_out: str) -> list[str]:
    """Notes on the columns that a source could not read, given as JSON."""
    return [f"column {column} dropped, which JSON cannot represent" for column in json.loads(left_out)]


def with_left_out(problem: str, left_out: str) -> str:
    """A row's problem, with the dropped columns, which may be the reason."""
    columns = json.loads(left_out)
    return f"{problem}; columns dropped: {', '.join(columns)}" if columns else problem


@dataclass
class Places:
    """Number of affected rows, and the places of the first ones."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, places: Sequence[str]) -> None:
        self.count += len(places)
        self.first += places[: max(0, MAX_SHOWN - len(self.first))]

    def __str__(self) -> str:
        return describe_bad_rows(self.first, self.count)


@dataclass(frozen=True)
class Policy:
    """Policy for bad, long and repeated rows, and the config keys that set it, for messages."""

    noun: str  # prompts, examples
    on_bad_row: Literal["fail", "skip"]
    on_long: Literal["fail", "drop", "truncate"]
    max_tokens: int
    max_tokens_key: str
    on_long_fix: str  # such as "data.on_long_prompt to drop or truncate"
    cut: str = "the beginning"  # the part that truncation removes
    on_duplicate_id: Literal["fail", "skip"] = "fail"


@dataclass
class Tally:
    """Row counts, and a hash of the `contents` of the rows that are kept."""

    policy: Policy
    rows_of_source: list[int]
    contents: tuple[str, ...]  # columns that the fingerprint covers
    bad: Places = field(default_factory=Places)
    long: Places = field(default_factory=Places)
    repeated: Places = field(default_factory=Places)
    notes: dict[str, Places] = field(default_factory=dict)  # by note
    _place_of_id: dict[str, str] = field(default_factory=dict)
    _digests: dict[str, Any] = field(default_factory=dict)

    def usable_rows(self, batch: pa.Table) -> pa.Table:
        """The rows of a batch that are kept. Raises `DataError` if the policy is "fail"."""
        problems = batch.column("problem").to_pylist()
        places = batch.column("place").to_pylist()
        of_no_row = [
            problem for place, problem in zip(places, problems, strict=True) if problem and not place
        ]
        if of_no_row:
            raise DataError(of_no_row[0])
        bad = [f"{place}: {problem}" for place, problem in zip(places, problems, strict=True) if problem]
        if bad and self.policy.on_bad_row == "fail":
            raise DataError(f"rows that cannot be used\n{describe_bad_rows(bad)}\n{on_bad_row_fix()}")
        self.bad.add(bad)
        keep = np.array([not problem for problem in problems])
        keep[self._repeated(batch, keep)] = False
        long = self._long(batch, keep)
        if self.policy.on_long == "drop":
            keep[long] = False
        self._note(batch, keep)
        kept = batch.filter(pa.array(keep))
        self._keep(kept)
        return kept

    def _repeated(self, batch: pa.Table, keep: np.ndarray) -> list[int]:
        if "id" not in batch.column_names:
            return []
        ids, places = batch.column("id").to_pylist(), batch.column("place").to_pylist()
        repeated, described = [], []
        for index in np.flatnonzero(keep).tolist():
            if not ids[index]:
                continue
            first = self._place_of_id.setdefault(ids[index], places[index])
            if first != places[index]:
                repeated.append(index)
                described.append(f"{places[index]}: the id {ids[index]} is already used by {first}")
        if repeated and self.policy.on_duplicate_id == "fail":
            raise DataError(
                f"rows with the same id\n{describe_bad_rows(described)}\n"
                "make the ids unique, or set data.on_duplicate_id=skip"
            )
        self.repeated.add(described)
        return repeated

    def _note(self, batch: pa.Table, keep: np.ndarray) -> None:
        places, notes = batch.column("place").to_pylist(), batch.column("notes").to_pylist()
        for index in np.flatnonzero(keep).tolist():
            for note in notes[index] or []:
                self.notes.setdefault(note, Places()).add([places[index]])

    def _long(self, batch: pa.Table, keep: np.ndarray) -> list[int]:
        policy = self.policy
        lengths, places = batch.column("num_tokens").to_pylist(), batch.column("place").to_pylist()
        long = [i for i, length in enumerate(lengths) if keep[i] and length > policy.max_tokens]
        described = [f"{places[index]}: {lengths[index]} tokens" for index in long]
        if long and policy.on_long == "fail":
            raise DataError(
                f"{policy.noun} longer than {policy.max_tokens_key}={policy.max_tokens}\n"
                f"{describe_bad_rows(described)}\nraise {policy.max_tokens_key} to {max(lengths)} or more, "
                f"or set {policy.on_long_fix}"
            )
        self.long.add(described)
        return long

    def _keep(self, rows: pa.Table) -> None:
        for source in rows.column("source").to_pylist():
            self.rows_of_source[source] += 1
        for batch in rows.to_batches():
            for name in self.contents:
                for part, content in _contents_of(batch.column(name), name):
                    self._digests.setdefault(part, hashlib.sha256()).update(content)

    def fingerprint(self, order: np.ndarray, partners: np.ndarray | None = None) -> str:
        """A hash of the contents, their order and, if rows have partners, the assignment."""
        whole = hashlib.sha256(order.astype("<i8").tobytes())
        if partners is not None:
            whole.update(partners.astype("<i8").tobytes())
        for digest in self._digests.values():
            whole.update(digest.digest())
        return whole.hexdigest()

    def counts(self, order: np.ndarray) -> dict[str, int]:
        return {
            "rows": len(order),
            "skipped_bad": self.bad.count,
            "dropped_long": self.long.count if self.policy.on_long == "drop" else 0,
            "truncated": self.long.count if self.policy.on_long == "truncate" else 0,
            "unused_by_mixing": sum(self.rows_of_source) - len(np.unique(order)),
        }

    def log(self) -> None:
        """Log what was dropped or changed: the number of rows, and the first of them."""
        noun, key = self.policy.noun, self.policy.max_tokens_key
        if self.bad.count:
            logger.warning("skipped %d bad rows (data.on_bad_row=skip)\n%s", self.bad.count, self.bad)
        if self.repeated.count:
            logger.warning("skipped %d rows with a duplicate id\n%s", self.repeated.count, self.repeated)
        if self.long.count and self.policy.on_long == "drop":
            logger.warning("dropped %d %s longer than %s\n%s", self.long.count, noun, key, self.long)
        elif self.long.count:
            cut = self.policy.cut
            logger.warning("cut %s off %d %s longer than %s\n%s", cut, self.long.count, noun, key, self.long)
        for note, places in self.notes.items():
            logger.warning("%s, in %d %s\n%s", note, places.count, noun, places)

    def check_rows_left(self, sources: Sequence[SourceConfig], split: Split) -> None:
        """Raises `DataError` if no row is left, or none of a source with a mixing probability."""
        empty = [
            f"data.{split}[{index}]={source.path}"
            for index, source in enumerate(sources)
            if self.rows_of_source[index] == 0
        ]
        if empty and (len(empty) == len(sources) or sources[0].probability is not None):
            raise DataError(
                f"no usable row in {', '.join(empty)} ({self.bad.count} bad rows skipped, "
                f"{self.long.count} long {self.policy.noun} dropped); "
                f"check the files, the keys of data and {self.policy.max_tokens_key}"
            )

    def row_order(
        self, sources: Sequence[SourceConfig], seed: int, stops: MixingStops = "first_exhausted"
    ) -> np.ndarray:
        """The kept rows in reading order, or mixed if sources have probabilities: [rows] int64."""
        probabilities = [source.probability for source in sources if source.probability is not None]
        if not probabilities:
            return np.arange(sum(self.rows_of_source))
        order = mixing_order(self.rows_of_source, probabilities, seed, stops)
        distinct = len(np.unique(order))
        if unused := sum(self.rows_of_source) - distinct:
            logger.info("mixing by probability leaves %d rows unused, to keep the proportions", unused)
        if repeats := len(order) - distinct:
            logger.info("mixing by probability repeats rows %d times, so that every row is used", repeats)
        return order


def _contents_of(array: pa.Array, name: str) -> Iterator[tuple[str, bytes]]:
    """The contents of a column in named parts, lengths and values separate.

    Hashes of the parts do not depend on the division of rows into batches.
    """
    if pa.types.is_list(array.type):
        yield f"{name}.lengths", array.value_lengths().to_numpy(zero_copy_only=False).tobytes()
        yield from _contents_of(array.flatten(), f"{name}.items")
    elif pa.types.is_string(array.type) or pa.types.is_large_binary(array.type):
        texts = [text.encode() if isinstance(text, str) else text for text in array.to_pylist()]
        yield f"{name}.lengths", np.array([len(text) for text in texts], dtype="<i8").tobytes()
        yield name, b"".join(texts)
    else:
        yield name, array.to_numpy(zero_copy_only=False).tobytes()
