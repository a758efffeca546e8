"""Number 21: text that is not ours, on its way to a terminal."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.terminal import SafeConsole
from rayrlhf.untrusted_text import one_line, printable, traceback_text, visible, write_line
from tests.hostile_text import HOSTILE, assert_harmless

# Arabic, Syriac and Kaithi signs of category Cf that are visible.
VISIBLE = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;pwned\x07", r"\x1b]0;pwned\x07"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("good\rbad", r"good\rbad".replace("\\r", "\\x0d")),
        ("\u202eabc", r"\u202eabc"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("two\nlines\tand é ☀️", "two\nlines\tand é ☀️"),
        (r"\x1b stays", r"\x1b stays"),
    ],
)
def test_what_steers_a_terminal_or_hides_is_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown and visible(visible(text)) == shown


def test_every_character_of_unicode_that_controls_or_formats() -> None:
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in VISIBLE and chr(code) not in "\n\t":
            assert visible(chr(code)).startswith("\\"), hex(code)
        elif category[0] in "LNPSZ" and chr(code) not in "\u115f\u1160\u3164\uffa0":
            assert visible(chr(code)) == chr(code), hex(code)


@given(st.text(st.characters()), st.integers(0, 40))
def test_no_text_gets_past(text: str, limit: int) -> None:
    shown = visible(text, limit=limit)
    assert_harmless(shown)
    assert len(shown) <= 10 * limit + 40
    assert "\n" not in one_line(text)
    # The pieces of a stream, cut anywhere, are the whole.
    assert visible(text[:limit]) + visible(text[limit:]) == visible(text)


def test_a_long_text_says_what_is_missing() -> None:
    assert visible("x" * 30, limit=10) == "x" * 10 + " … and 20 more characters"
    assert len(one_line("\x1b " * 5_000_000)) < 10_000


def test_an_encoding_that_cannot_print() -> None:
    assert printable("é ☀ 😀", "ascii") == r"\xe9 \u2600 \U0001f600"
    assert printable("é ☀", None) == "é ☀"


def test_write_line_on_a_stream_that_has_ascii_alone() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    write_line("é " + HOSTILE, stream)
    stream.seek(0)
    assert_harmless(stream.read())


def test_a_console_prints_nothing_else(tmp_path: Path) -> None:
    """Neither markup, nor an emoji's name, nor a code, in whatever is printed."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = SafeConsole(file=stream, width=400)
    console.print(HOSTILE + " é")
    console.out(HOSTILE)
    console.print("[red]r[/] [/] :smile: [link=file:///x]y[/link]")
    stream.seek(0)
    text = stream.read()
    assert_harmless(text)
    assert "[red]r[/] [/] :smile: [link=file:///x]y[/link]" in text


def test_a_traceback_that_quotes_a_response() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        text = traceback_text(error)
    assert_harmless(text)
    assert text.startswith("Traceback") and text.count("\n") >= 3


PROGRAM = """
import logging, threading
from rayrlhf.untrusted_text import guard_terminal
from tests.hostile_text import HOSTILE
guard_terminal()
logging.getLogger("some.library").warning("row %s", HOSTILE)
thread = threading.Thread(target=lambda: exec("raise ValueError(HOSTILE)", globals()))
thread.start()
thread.join()
raise RuntimeError(HOSTILE)
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_errors_that_nobody_caught_and_warnings_without_a_handler(locale: str) -> None:
    """Before: Python wrote all three raw."""
    environment = {"LC_ALL": locale, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUTF8": "0"}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, env=environment, timeout=120)
    text = ended.stderr.decode(errors="surrogateescape")
    assert ended.returncode == 1 and len(re.findall(r"\\x1b\]0;pwned\\x07", text)) == 3
    assert_harmless(text)


def test_the_guard_leaves_other_loggers_alone() -> None:
    assert logging.getLogger("rayrlhf").handlers == []
