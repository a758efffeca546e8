"""`rayrlhf chat` as a process: from a pipe and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayrlhf.commands.chat.main import main

REPOSITORY = Path(__file__).parents[3]
WAIT_SECONDS = 120  # 8 s on an idle machine


def piped(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_lines_from_a_pipe(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "Hello", "/reset", "Hello", "/nonsense", "/exit", "never said")
    assert main([tiny_model, "--base", tiny_model, "--temperature", "0", "--max-new-tokens", "12"]) == 0
    said = capsys.readouterr()
    names = [name for name in ("base: ", "tuned: ") for _ in range(said.out.count(name))]
    assert names == ["base: "] * 2 + ["tuned: "] * 2
    once, twice = said.out[: len(said.out) // 2], said.out[len(said.out) // 2 :]
    assert once == twice, "the same question after /reset, and nothing but answers on stdout"
    assert said.err.count("12 tokens, ") == 4 and "no command /nonsense" in said.err


def test_mistakes_are_reported_before_anything_loads(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        ([str(tmp_path / "none")], f"MODEL={tmp_path}/none: no such folder"),
        ([str(tmp_path)], "neither config.json nor adapter_config.json"),
        ([tiny_model, "--base", "./no"], "--base=./no: no such folder"),
        ([tiny_model, "--chat-template", str(tmp_path / "x")], "cannot be read"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([tiny_model, "--temperature", "-1"])
    assert "wanted a number >= 0" in capsys.readouterr().err


class Typist:
    """A program on its own terminal."""

    def __init__(self, *words: str) -> None:
        self.terminal, other = pty.openpty()
        code = "import sys; from rayrlhf.commands.chat.main import main; sys.exit(main(sys.argv[1:]))"
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(other)
        self.said = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, after: int = 0) -> int:
        """Its position in the whole output."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (place := self.said.find(text, after)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.said!r}"
            if select.select([self.terminal], [], [], 1.0)[0]:
                self.said += os.read(self.terminal, 65536).decode(errors="replace")
        return place + len(text)


def take_terminal() -> None:
    """Make the terminal on stdin the one whose Ctrl-C reaches this process, which heeds it: tests that run in
    the background have inherited to ignore it.
    """
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("base", [False, True])
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_model: str, base: bool) -> None:
    more = ["--base", tiny_model] if base else []
    typist = Typist(tiny_model, *more, "--max-new-tokens", "480", "--seed", "3", "--system", "x")
    try:
        place = typist.wait_for("> ")
        typist.type("Hello\n")
        place = typist.wait_for("base" if base else "\n", typist.wait_for("Hello", place))
        time.sleep(0.3)
        typist.type("\x03")
        place = typist.wait_for("tokens/s", place)
        place = typist.wait_for("> ", place)
        time.sleep(1)  # readline prints its prompt before it listens to signals
        typist.type("\x03")  # no answer is being generated: nothing to stop
        place = typist.wait_for("/exit or Ctrl-D leaves", place)
        typist.wait_for("> ", place)
        time.sleep(1)
        typist.type("/exit\n")
        assert typist.process.wait(WAIT_SECONDS) == 0
        assert "Traceback" not in typist.said
    finally:
        typist.process.kill()
        typist.process.wait()
        os.close(typist.terminal)
