"""`rayrlhf merge-lora ADAPTER OUT [--base BASE]`: a whole checkpoint from an adapter and its base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.ids import parse_id
from rayrlhf.hub.resolve import folder_of
from rayrlhf.models.adapter_format import MergeProblem, check_base, make_plan
from rayrlhf.untrusted_text import write_line


def _note(text: str) -> None:
    write_line(text, sys.stderr)


def main(words: Sequence[str]) -> int:
    """Exit codes: 0 merged, 2 cannot be merged."""
    parser = argparse.ArgumentParser(
        prog="rayrlhf merge-lora",
        description="Merge a PEFT adapter into its base, on the CPU, and write a whole checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json, or a hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    parser.add_argument("--base", help="the base checkpoint, if it is not at the path in adapter_config.json")
    options = parser.parse_args(words)
    try:
        adapter = options.adapter
        if not isinstance(parse_id(adapter), str):
            adapter = folder_of(adapter, "ADAPTER", say=_note, may_be_adapter=True)
        plan = make_plan(adapter, options.out, options.base)
        folder = folder_of(plan.base, "the base", say=_note)
        check_base(folder)
        from rayrlhf.models.merge import merge  # imports torch, transformers and peft, which takes seconds

        write_line(merge(replace(plan, base_folder=folder)))
    except (MergeProblem, HubError) as problem:
        write_line(f"error: {problem}", sys.stderr)
        return 2
    return 0
