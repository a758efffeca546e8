"""What a model, a row or a server may say to whoever reads it in a terminal."""

from __future__ import annotations

import unicodedata

HOSTILE = (
    "\x1b]0;pwned\x07"  # the terminal's title
    "\x1b[2J\x1b[H"  # an empty screen
    "\x1b]52;c;cm0gLXJmIH4=\x07"  # the clipboard
    "good\rbad \x08\x08 \x9b31m \x00 \x7f"  # overwritten; CSI as one character of C1
    "\u202egnp.exe\u202c \u2066x\u2069 \u200b\u200d\ufeff \U000e0041 \u2028"  # another order; not to be seen
    "[red]r[/red] [/] [/nope] :smile:"  # markup and emoji of rich
)


def assert_harmless(text: str) -> None:
    """Not one character of control but the newline (and the tab), none of format, no surrogate."""
    for character in text:
        drawn = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        arabic = 0x600 <= ord(character) < 0x900 or ord(character) in (0x110BD, 0x110CD)
        assert drawn or arabic or character in "\n\t", f"{character!r} in {text[:2000]!r}"
