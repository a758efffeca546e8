"""Prints a data preview on a terminal, or as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from rayrlhf.config.example_data import ExampleDataConfig, PairDataConfig, PrmDataConfig
from rayrlhf.data.chat import decode_prompt
from rayrlhf.data.render import RenderedExample, RenderedSequence
from rayrlhf.data.rows.row import describe_bad_rows
from rayrlhf.untrusted_text import MESSAGE_CHARACTERS, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayrlhf.commands.data_preview import Preview

LOSS, MASKED = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"  # around loss tokens where there are no colours
MAX_TOKENS_SHOWN = 400
BINS, BAR_WIDTH = 10, 40


def show(
    console: Console,
    preview: Preview,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    fill: float | None,
    num_shown: int,
) -> None:
    """Print the first examples with their loss tokens marked, then counts, lengths and packing."""
    in_colour = console.is_terminal and not console.no_color
    marks = Text("loss tokens", LOSS) if in_colour else Text(f"{OPEN}loss tokens{CLOSE}")
    console.print(Text.assemble("Tokens: ", marks, ", ", Text("masked", MASKED if in_colour else "")))
    for place, example in preview.examples[:num_shown]:
        console.print()
        console.print(Text(f"{visible(place)}{_value(example, config.data)}", "bold"))
        for name, sequence in zip(_names(example, config.data), example.sequences, strict=True):
            console.print(Text(f"-- {name}{len(sequence)} tokens, {sum(sequence.loss_mask)} loss tokens"))
            console.print(_marked(sequence, tokenizer, in_colour))
    console.print()
    for line in (*_counts(preview, config.data), *_lengths(preview), *_packing(fill, config)):
        console.print(Text(visible(line, limit=MESSAGE_CHARACTERS)))


def _value(example: RenderedExample, data: ExampleDataConfig) -> str:
    if isinstance(data, PairDataConfig):
        return f"  margin {example.value:g}"
    return f"  {'desirable' if example.value else 'undesirable'}" if data.sequences_per_example == 2 else ""


def _names(example: RenderedExample, data: ExampleDataConfig) -> Sequence[str]:
    return ("chosen: ", "rejected: ") if isinstance(data, PairDataConfig) else [""] * len(example.sequences)


def _marked(sequence: RenderedSequence, tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> Text:
    """The text of a sequence with loss tokens marked; labels of steps follow them."""
    shown = sequence.part(0, MAX_TOKENS_SHOWN)
    text = Text()
    for start, stop in _runs(shown):
        piece = visible(decode_prompt(shown.input_ids[start:stop], tokenizer), limit=MESSAGE_CHARACTERS)
        has_loss = bool(shown.loss_mask[start])
        if has_loss and not in_colour:
            piece = f"{OPEN}{piece}{CLOSE}"
        text.append(piece, (LOSS if has_loss else MASKED) if in_colour else "")
        if has_loss and shown.targets:
            text.append(f" = {shown.targets[start]:g} ", "bold" if in_colour else "")
    if left := len(sequence) - len(shown):
        text.append(f" … and {left} more tokens")
    return text


def _runs(sequence: RenderedSequence) -> Iterator[tuple[int, int]]:
    """Spans of tokens with the same loss mask; a labelled token is a span by itself."""
    start = 0
    for index in range(1, len(sequence) + 1):
        ends = index == len(sequence) or sequence.loss_mask[index] != sequence.loss_mask[start]
        if ends or (sequence.targets and sequence.loss_mask[start]):
            yield start, index
            start = index


def _counts(preview: Preview, data: ExampleDataConfig) -> Iterator[str]:
    yield f"{preview.num_rows} rows of data.{preview.split} read, {len(preview.examples)} examples"
    long = {
        "fail": "too long: they would stop the job",
        "drop": "too long: dropped",
        "truncate_head": "too long: cut at the beginning",
        "truncate_tail": "too long: cut at the end",
    }
    stops = "they would stop the job" if data.on_bad_row == "fail" else "skipped"
    repeated = "they would stop the job" if data.on_duplicate_id == "fail" else "skipped"
    for places, what in (
        (preview.bad, f"bad: {stops} (data.on_bad_row={data.on_bad_row})"),
        (preview.long, f"{long[data.on_long]} (data.on_long={data.on_long}, max_tokens={data.max_tokens})"),
        (
            preview.duplicates,
            f"with an id seen before: {repeated} (data.on_duplicate_id={data.on_duplicate_id})",
        ),
    ):
        if places:
            yield f"{len(places)} {what}"
            yield describe_bad_rows(places)
        else:
            yield f"0 {what.partition(':')[0]}"
    for note, rows in preview.notes.items():
        yield f"{rows.count} with {note}"
        yield str(rows)


def _lengths(preview: Preview) -> Iterator[str]:
    sequences = [sequence for _, example in preview.examples for sequence in example.sequences]
    if not sequences:
        return
    lengths = np.array([len(sequence) for sequence in sequences])
    loss_tokens = sum(sum(sequence.loss_mask) for sequence in sequences)
    yield ""
    yield (
        f"tokens per sequence: {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}, "
        f"95 % are at most {np.percentile(lengths, 95):.0f}; "
        f"{loss_tokens / lengths.sum():.0%} are loss tokens"
    )
    yield from histogram(lengths)


def histogram(lengths: np.ndarray) -> list[str]:
    """A line per range of whole numbers, all equally wide, at most `BINS` of them."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    lines = []
    for first, count in zip(range(low, high + 1, width), counts, strict=True):
        last = min(first + width - 1, high)
        span = f"{first}" if first == last else f"{first} – {last}"
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"  {span:>15} {count:>6} {bar}".rstrip())
    return lines


def _packing(fill: float | None, config: Any) -> Iterator[str]:
    if fill is None:
        return
    train = config.train
    size = (
        f"{train.samples_per_step} samples" if train.samples_per_step else f"{train.tokens_per_step} tokens"
    )
    yield ""
    yield (
        f"packing: micro-batches of train.max_tokens_per_micro_batch={train.max_tokens_per_micro_batch} are "
        f"{fill:.0%} full with {size} per step on {train.num_workers} workers"
    )
    if isinstance(config.data, PrmDataConfig):
        yield f"steps are judged at the token {config.data.step_token!r}"
