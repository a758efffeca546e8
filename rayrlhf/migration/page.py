"""docs/migration.md from the table of `migration`: `python -m rayrlhf.migration.page [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.migration.table import PROJECTS, Word

HEAD = """\
# Coming from TRL, OpenRLHF or verl

What their settings are called here. A job that is given one of these words, in a file or on the command line,
says the same: `python jobs/ppo.py config.yaml --learning_rate 1e-6` answers with `train.lr`.

Three things are different throughout:

- Settings are YAML keys, and `key.path=value` on the command line, without dashes.
- A step's size is counted over all workers, in prompts (`rollout.prompts_per_step`) or samples
  (`train.samples_per_step`). There is no accumulation to set: `train.max_tokens_per_micro_batch` says how
  many tokens go through a device at a time, and a step takes as many micro-batches as it needs.
- Each role has its own number of workers or replicas, and `placement.preset` says which share devices.

This page is made by `make rendered` from `rayrlhf/migration/table.py`.
"""


def page() -> str:
    return "\n".join([HEAD, *(line for name, words in PROJECTS.items() for line in _section(name, words))])


def _section(project: str, words: tuple[Word, ...]) -> Iterator[str]:
    yield from (f"## {project}", "", f"| {project} | here | |", "|---|---|---|")
    for word in words:
        ours = " or ".join(f"`{text}`" for text in word.ours) or "—"
        yield f"| `{word.theirs}` | {ours} | {word.how} |"
    yield ""


def main() -> None:
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
