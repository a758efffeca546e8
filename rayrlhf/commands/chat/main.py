"""`rayrlhf chat MODEL [--base BASE]`: chat with a checkpoint; with --base, with its base model as well."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rayrlhf.commands.chat.conversation import HELP, ChatProblem, Conversation, Sampling, Screen
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.ids import parse_id
from rayrlhf.hub.resolve import base_of, folder_of, no_folder
from rayrlhf.hub.snapshots import ADAPTER_CONFIG
from rayrlhf.untrusted_text import write_line


def main(words: Sequence[str]) -> int:
    """Exit codes: 0 on exit, 2 bad input, 130 interrupted while no answer was generated (no terminal)."""
    options = _parser().parse_args(words)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        conversation = _start(options, interactive)
    except ChatProblem as problem:
        write_line(f"error: {problem}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    lines = _typed() if interactive else sys.stdin
    try:
        for line in lines:
            with _interruptible() as is_stopped:
                if not conversation.line(line, is_stopped):
                    break
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf chat",
        description="Chat with a checkpoint. Without a terminal every line of stdin is one message.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder of a checkpoint or of a PEFT adapter, or a hub id")
    parser.add_argument("--base", help="a second checkpoint, whose answers are shown side by side")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=_number(0.0), default=0.7, help="0: the likeliest token (0.7)")
    parser.add_argument("--top-p", type=_number(0.0, 1.0), default=1.0, help="nucleus sampling (1: off)")
    parser.add_argument("--top-k", type=_whole(0), default=0, help="the k likeliest tokens only (0: off)")
    parser.add_argument("--max-new-tokens", type=_whole(1), default=512, help="longest answer (512)")
    parser.add_argument("--seed", type=_whole(0), help="the same seed and messages give the same answers")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file in place of the tokenizer's own")
    return parser


def _number(lowest: float, highest: float = float("inf")) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not lowest <= value <= highest or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: wanted a number >= {lowest:g} and <= {highest:g}")
        return value

    return number


def _whole(lowest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: wanted an integer >= {lowest}")
        return int(text)

    return integer


def _start(options: argparse.Namespace, interactive: bool) -> Conversation:
    """Raises `ChatProblem`; all input that can be checked without a model is checked before one is loaded."""
    for name, path in (("MODEL", options.model), ("--base", options.base)):
        if path is not None:
            _check_checkpoint(name, path)
    template = None if options.chat_template is None else _read_template(options.chat_template)
    screen = _screen(interactive, 1 if options.base is None else 2)
    screen.note("loading …")
    model = _fetched("MODEL", options.model, screen)
    base = None if options.base is None else _fetched("--base", options.base, screen)
    if not Path("/dev/nvidiactl").exists():
        # transformers imports DeepSpeed, which otherwise warns that it has found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rayrlhf.commands.chat.speaker import load_speakers  # torch and transformers: takes seconds

    name = Path(options.model).name.partition("@")[0]
    speakers = load_speakers(model, base, dtype=options.dtype, chat_template=template, name=name)
    if interactive:
        screen.note(HELP)
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        seed=random.randrange(2**31) if options.seed is None else options.seed,
    )
    return Conversation([*speakers], screen, sampling, system=options.system)


def _check_checkpoint(name: str, path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ChatProblem(
                f"{name}={path}: the folder has neither config.json nor adapter_config.json; "
                "wanted a Hugging Face checkpoint, such as the export/ of a run"
            )
    elif isinstance(reason := parse_id(path), str):
        raise ChatProblem(no_folder(name, path, reason))


def _fetched(name: str, path: str, screen: Screen) -> str:
    """The local folder of a checkpoint, downloaded if needed, with the base of an adapter. Raises
    `ChatProblem`.
    """
    try:
        folder = folder_of(path, name, say=screen.note, may_be_adapter=True)
        base = base_of(Path(folder)) if (Path(folder) / ADAPTER_CONFIG).is_file() else None
        if base is not None:
            folder_of(base, f"the base of {name}={path}", say=screen.note)
    except HubError as error:
        raise ChatProblem(str(error)) from error
    return folder


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatProblem(f"--chat-template={path} cannot be read: {error}") from error


def _screen(interactive: bool, num_speakers: int) -> Screen:
    from rayrlhf.commands.chat.screens import Columns, Lines, Terminal

    if not interactive:
        return Lines()
    from rayrlhf.terminal import SafeConsole

    console = SafeConsole()
    return Terminal(console) if num_speakers == 1 else Columns(console)


def _typed() -> Iterator[str]:
    """Typed lines; Ctrl-C starts a new line, Ctrl-D ends them."""
    import readline  # noqa: F401  (arrow keys and history for `input`)

    while True:
        try:
            yield input("\n> ")
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves")
        except EOFError:
            print()
            return


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, which generation checks after every token."""
    stopped = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
