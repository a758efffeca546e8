"""Number 21: what a model says in a chat never steers the terminal, however it is cut into pieces."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as PlainConsole

from rayrlhf.commands.chat.conversation import Answer, Screen
from rayrlhf.commands.chat.screens import Columns, Lines, Terminal
from rayrlhf.terminal import SafeConsole
from tests.hostile_text import HOSTILE, assert_harmless


def speak(screen: Screen, names: list[str], size: int) -> None:
    screen.begin(names)
    for speaker in range(len(names)):
        for start in range(0, len(HOSTILE), size):
            screen.piece(speaker, HOSTILE[start : start + size])
    screen.end([Answer(HOSTILE, 9, 1.0) for _ in names])
    screen.note(HOSTILE)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("kind", [Terminal, Columns])
def test_21_an_answer_on_a_terminal(kind: type[Terminal], encoding: str, size: int) -> None:
    """Before: raw, in one piece or in many; with ASCII alone a UnicodeEncodeError."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    speak(kind(SafeConsole(file=stream, width=300)), ["a", f"b{HOSTILE}"][: 1 + (kind is Columns)], size)
    stream.seek(0)
    output = stream.read()
    assert_harmless(output)
    assert r"\x1b]0;pwned\x07\x1b[2J" in output and ":smile:" in output and "[/nope]" in output


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_21_answers_in_a_pipe(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    speak(Lines(), ["a", f"b{HOSTILE}"], size)
    output = capsys.readouterr()
    assert_harmless(output.out + output.err)
    assert output.out.count(r"\x1b]52;c;cm0gLXJmIH4=\x07") == 3, "two answers and a name"


def test_pieces_are_harmless_before_they_reach_the_console() -> None:
    stream = io.StringIO()
    speak(Terminal(PlainConsole(file=stream, width=300, markup=False)), ["a"], 1)
    assert_harmless(stream.getvalue())
