"""rich console that escapes untrusted text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rayrlhf.secrets import masked
from rayrlhf.untrusted_text import printable, visible

LOG_WIDTH = 140  # columns, if the output is not a terminal


class SafeConsole(Console):
    """Prints text literally: `[red]` and `:smile:` are not interpreted, control and invisible characters are
    shown as escapes, secrets as `***`, and characters that the output's encoding lacks as `\\u2026`. Colours
    come from styles only.

    Known untrusted text is passed through `visible` before layout, since an escape is wider than the
    character it replaces; this class is the last safeguard.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:  # control codes of rich itself: cursor, title
                yield segment
            else:
                text = printable(visible(masked(segment.text)), self.encoding)
                yield Segment(text, segment.style) if text != segment.text else segment


def make_console(*, log_width: int | None = LOG_WIDTH, **options: Any) -> SafeConsole:
    """Console for stdout: terminal width, or `log_width` in a log."""
    return SafeConsole(width=None if sys.stdout.isatty() else log_width, **options)
