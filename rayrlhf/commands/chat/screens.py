"""Output of a conversation: lines for a pipe, streamed text in a terminal, or two columns in it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rayrlhf.commands.chat.conversation import Answer
from rayrlhf.untrusted_text import one_line, visible, write_line

REDRAWS_PER_SECOND = 8


class Lines:
    """Answers on stdout, all else on stderr. With two speakers each answer begins with its name.

    A pipe may end at a terminal or in a program's log: control codes are escaped here too.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.speaking: int | None = None

    def note(self, text: str) -> None:
        write_line(text, sys.stderr)

    def begin(self, names: list[str]) -> None:
        self.names = names
        self.speaking = None

    def piece(self, speaker: int, text: str) -> None:
        if speaker != self.speaking and len(self.names) > 1:
            gap = "\n" if self.speaking is not None else ""
            write_line(f"{gap}{one_line(self.names[speaker])}: ", end="")
        self.speaking = speaker
        write_line(text, end="")

    def end(self, answers: list[Answer]) -> None:
        if answers:
            print(flush=True)
        for name, answer in zip(self.names, answers, strict=False):
            self.note(f"({name}: {answer.speed})")


class Terminal:
    """A terminal with one speaker, whose text is streamed."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        self.console.print(Text(visible(text), style="dim"))

    def begin(self, names: list[str]) -> None: ...

    def piece(self, speaker: int, text: str) -> None:
        self.console.out(visible(text), end="", highlight=False)
        self.console.file.flush()

    def end(self, answers: list[Answer]) -> None:
        self.console.print()
        for answer in answers:
            self.note(answer.speed)


class Columns(Terminal):
    """Two speakers side by side. During generation the last lines that fit the terminal are shown; the whole
    text is printed at the end.
    """

    def begin(self, names: list[str]) -> None:
        self.names = names
        self.texts = [""] * len(names)
        self.live = Live(console=self.console, transient=True, refresh_per_second=REDRAWS_PER_SECOND)
        self.live.start()

    def piece(self, speaker: int, text: str) -> None:
        self.texts[speaker] += visible(text)
        self.live.update(self._table([], max_lines=max(4, self.console.height - 6)))

    def end(self, answers: list[Answer]) -> None:
        self.live.update(Text(""))
        self.live.stop()
        self.console.print(self._table(answers, max_lines=None))

    def _table(self, answers: list[Answer], *, max_lines: int | None) -> Table:
        table = Table(expand=True, show_footer=bool(answers))
        cells = []
        for index, (name, text) in enumerate(zip(self.names, self.texts, strict=True)):
            footer = answers[index].speed if index < len(answers) else ""
            table.add_column(one_line(name), footer=Text(footer, style="dim"), ratio=1, overflow="fold")
            cells.append(Text(text) if max_lines is None else self._tail(text, max_lines))
        table.add_row(*cells)
        return table

    def _tail(self, text: str, max_lines: int) -> Text:
        width = max(10, self.console.width // len(self.names) - 4)
        return Text("\n").join(Text(text).wrap(self.console, width)[-max_lines:])
