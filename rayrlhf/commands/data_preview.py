"""`rayrlhf data preview`: the first rows of a supervised job, tokenised. Starts no Ray, writes nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.example_data import ExampleDataConfig
from rayrlhf.config.parse import load_or_exit
from rayrlhf.config.supervised import JOBS
from rayrlhf.config.yaml_tree import COMMAND_LINE, read_tree
from rayrlhf.data.batch_plan import fill_of, plan_steps
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.checks import head_rows
from rayrlhf.data.images import ImageReader, image_reader
from rayrlhf.data.images import folder_of as data_folder
from rayrlhf.data.render import RenderedExample, render_example
from rayrlhf.data.row_filter import Places, left_out_notes
from rayrlhf.data.rows.formats import id_of, normal_form
from rayrlhf.data.rows.images import with_bytes_as_text
from rayrlhf.data.rows.padding import without_padding
from rayrlhf.data.rows.row import BadRow, DataError, RawRow, columns_to_json
from rayrlhf.data.sources.files import Split, resolve_source
from rayrlhf.data.sources.hub_pins import pin_data
from rayrlhf.data.sources.split import in_split
from rayrlhf.data.step_order import step_order
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.resolve import folder_of
from rayrlhf.migration.other_keys import option_problem
from rayrlhf.untrusted_text import write_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_ROWS = 1000
DEFAULT_SHOWN = 3


def main(words: Sequence[str]) -> int:
    """`rayrlhf data preview CONFIG.yaml …`; the key `job` of the config selects the job."""
    parser = argparse.ArgumentParser(prog="rayrlhf data preview")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help="rows read, in all")
    parser.add_argument("--show", type=int, default=DEFAULT_SHOWN, help="examples shown")
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    options, argv = parser.parse_known_args(list(words))
    try:
        config = load_or_exit(_schema(argv), argv)
        folder = folder_of(config.model.path, "model.path", say=_note, weights=False)
        tokenizer = prompt_tokenizer(folder, config.model.trust_remote_code, read_chat_template(config.data))
        problems: list[str] = []
        data = pin_data(config.data, None, _note, problems)
        if problems:
            raise DataError("\n".join(problems))
        reader = image_reader(folder, config.model.trust_remote_code, data.image_timeout_seconds)
        preview = look_at(data, tokenizer, config.run.seed, options.split, options.rows, reader)
        fill = packing_fill(preview, config)
    except ConfigError as error:
        write_line(str(error), sys.stderr)
        return 2
    except (DataError, HubError) as error:
        write_line(str(error), sys.stderr)
        return 1
    from rayrlhf.commands.data_preview_text import show
    from rayrlhf.terminal import SafeConsole

    show(SafeConsole(soft_wrap=True), preview, config, tokenizer, fill, options.show)
    return 0


def _note(text: str) -> None:
    write_line(text, sys.stderr)


def _schema(argv: Sequence[str]) -> Any:
    tree = read_tree(argv)
    if tree.unreadable or tree.options:
        options = [option_problem(None, *option, COMMAND_LINE) for option in tree.options]
        raise ConfigError([*options, *tree.problems], tree.source)
    job = tree.values.get("job")
    if isinstance(job, str) and job in JOBS:
        return JOBS[job]
    got = "nothing" if job is None else repr(job)
    problem = Problem("job", got, f"one of {', '.join(JOBS)}", "add job: sft (or another) to the YAML")
    raise ConfigError([problem])


@dataclass
class Preview:
    """The rendered rows, and those that were left out or changed."""

    split: Split
    num_rows: int = 0  # of the split
    examples: list[tuple[str, RenderedExample]] = field(default_factory=list)  # with their places
    bad: list[str] = field(default_factory=list)  # file:row: problem
    long: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    notes: dict[str, Places] = field(default_factory=dict)  # by the change that was made to rows


def look_at(
    data: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    split: Split,
    rows: int,
    reader: ImageReader | None = None,
) -> Preview:
    """Render the first rows of a split, the same number per source. Raises `DataError` as the job would.
    `reader`: of the model's images; None: it has no vision.
    """
    preview = Preview(split)
    seen: dict[str, str] = {}
    for row in _first_rows(data, split, rows):
        try:
            if row.problem:
                raise BadRow(row.problem)
            columns_json, left_out = columns_to_json(with_bytes_as_text(row.columns, data.images_key))
            if not in_split(columns_json, split, data.eval_share, seed):
                continue
            columns = without_padding(row.columns, row.padded)
            found = normal_form(columns, data)
            example = render_example(found, data, tokenizer, reader, data_folder(row.file))
            left_out = left_out_notes(json.dumps([*row.left_out, *left_out]))
            row_id = id_of(row.columns, data)
        except BadRow as error:
            preview.num_rows += 1
            preview.bad.append(f"{row.place}: {error}")
            continue
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
        preview.num_rows += 1
        if row_id and seen.setdefault(row_id, row.place) != row.place:
            preview.duplicates.append(f"{row.place}: the id {row_id} is also that of {seen[row_id]}")
            continue
        if example.num_tokens > data.max_tokens:
            preview.long.append(f"{row.place}: {example.num_tokens} tokens")
            if data.on_long in ("fail", "drop"):
                continue
        for note in [*left_out, *example.notes]:
            preview.notes.setdefault(note, Places()).add([row.place])
        preview.examples.append((row.place, example))
    return preview


def _first_rows(data: ExampleDataConfig, split: Split, rows: int) -> Iterator[RawRow]:
    sources = data.sources_of(split)
    if not sources:
        raise DataError(f"data.{split} has no source; give data.eval or data.eval_share")
    files_of: Split = "train" if data.eval_share else split
    for source in sources:
        left = max(1, rows // len(sources))
        name = data.train_split if files_of == "train" else data.eval_split
        for file in resolve_source(source.path, files_of, name):
            if left < 1:
                break
            head = head_rows(file, left)
            if head is None:
                raise DataError(
                    f"{file.path} is one large JSON array; write it as JSON lines for a quick preview"
                )
            yield from head
            left -= len(head)


def packing_fill(preview: Preview, config: Any) -> float | None:
    """Fill of the job's micro-batches, estimated from the previewed rows; None without rows. KTO's second
    sequence, which is made when the data is prepared, has micro-batches of its own.
    """
    examples = [example for _, example in preview.examples]
    lengths = [sum(map(len, example.sequences)) for example in examples]
    if not lengths:
        return None
    train, num_tokens = config.train, np.array(lengths, dtype=np.int64)
    changes: dict[str, Any] = {"num_steps": None, "num_epochs": 1.0}
    if train.samples_per_step is not None:
        changes["samples_per_step"] = min(train.samples_per_step, len(lengths))
    order = step_order(train.model_copy(update=changes), num_tokens, config.run.seed, config.data.shuffle)
    plans = plan_steps(
        order, num_tokens, world_size=train.num_workers, budget_tokens=train.max_tokens_per_micro_batch
    )
    fills = [fill_of(plan, num_tokens, train.max_tokens_per_micro_batch) for plan in plans]
    return float(np.mean(fills))
