"""Command line `rayrlhf COMMAND …`, also `python -m rayrlhf.commands.cli`.

A command is one entry below. Its module is imported when it is called, so that `--help` is fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from rayrlhf.untrusted_text import guard_terminal, write_line


@dataclass(frozen=True)
class Command:
    function: str  # module:function; takes the words after the command and returns the exit code
    arguments: str
    summary: str
    explains_itself: bool = False  # has its own --help
    needs_words: bool = True  # without words, its usage is printed


COMMANDS: dict[str, Command] = {
    "chat": Command(
        "rayrlhf.commands.chat.main:main",
        "MODEL [--base BASE] [--system TEXT] [--temperature X] [--top-p P] [--top-k K] [--max-new-tokens N] "
        "[--seed N] [--dtype D] [--chat-template FILE]",
        "chat with a checkpoint, with --base with two side by side; from a pipe, every line is one message",
        explains_itself=True,
    ),
    "plan": Command(
        "rayrlhf.commands.plan_with_verdicts:main",
        "CONFIG.yaml [OTHER.yaml ...] [key.path=value ...] [--gpus 16xA100-80] [--suggest] [--json]",
        "placement and memory of every role, whether it fits and what to change; starts nothing",
        explains_itself=True,
    ),
    "render": Command(
        "rayrlhf.commands.render.targets:main",
        "--target local|ray-job|kuberay|anyscale|slurm CONFIG.yaml [key.path=value ...] [--out FILE]",
        "the script or manifest with which a launcher runs a job, from the job's config",
        explains_itself=True,
    ),
    "doctor": Command(
        "rayrlhf.commands.doctor.doctor:main",
        "[--address ADDRESS] [--path FOLDER] [--no-ray] [--json]",
        "check whether this machine, or a cluster, can run jobs, with a fix for what fails",
        explains_itself=True,
        needs_words=False,
    ),
    "merge-lora": Command(
        "rayrlhf.commands.merge_lora:main",
        "ADAPTER OUT [--base BASE]",
        "merge a PEFT adapter into its base, on the CPU, and write a whole Hugging Face checkpoint",
    ),
    "data preview": Command(
        "rayrlhf.commands.data_preview:main",
        "CONFIG.yaml [OTHER.yaml ...] [key.path=value ...] [--rows N] [--show N] [--split eval]",
        "rows of a supervised job as it trains on them: loss tokens, lengths, bad rows, packing",
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (default: the command line) begin with. Returns its exit code."""
    guard_terminal()
    words = list(sys.argv[1:] if words is None else words)
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS and len(words) >= length:
            return _run(name, words[length:])
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    name = " ".join(words[:2])
    near = get_close_matches(name, COMMANDS, n=1) or get_close_matches(words[0], COMMANDS, n=1)
    hint = f"did you mean rayrlhf {near[0]}?" if near else "rayrlhf --help lists the commands"
    write_line(f"rayrlhf has no command {name!r}; {hint}", sys.stderr)
    return 2


def _run(name: str, words: list[str]) -> int:
    command = COMMANDS[name]
    if (not words and command.needs_words) or (
        words and words[0] in ("-h", "--help") and not command.explains_itself
    ):
        print(f"usage: rayrlhf {name} {command.arguments}\n\n{command.summary}")
        return 0 if words else 2
    module, _, function = command.function.partition(":")
    return getattr(importlib.import_module(module), function)(words)


def _help() -> str:
    lines = ["usage: rayrlhf COMMAND ...", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name} {command.arguments}", f"      {command.summary}"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
