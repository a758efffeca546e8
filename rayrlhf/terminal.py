"""rich's console for text that may not be ours."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rayrlhf.secrets import masked
from rayrlhf.untrusted_text import printable, visible

LOG_WIDTH = 140  # where the output is no terminal


class SafeConsole(Console):
    """Texts are texts: `[red]` and `:smile:` in them mean nothing, what would steer the terminal or hide is
    shown as an escape, secrets as `***`, and what the output's encoding does not have as `\\u2026`. Colours
    come from styles alone.

    What is known to be foreign goes through `visible` before it is laid out, since an escape is wider than
    what it stands for; here nothing gets past.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:  # rich's own: cursor, title
                yield segment
            else:
                text = printable(visible(masked(segment.text)), self.encoding)
                yield Segment(text, segment.style) if text != segment.text else segment


def make_console(*, log_width: int | None = LOG_WIDTH, **options: Any) -> SafeConsole:
    """For stdout: as wide as a terminal, or `log_width` in a log."""
    return SafeConsole(width=None if sys.stdout.isatty() else log_width, **options)
