"""A conversation with one model, or with two side by side: lines in, answers out. Knows neither torch nor the
terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

Message = dict[str, str]  # {role, content}

HELP = """/reset             forget the conversation
/system TEXT       a new system prompt (none without TEXT); forgets the conversation
/temperature X     0 always takes the likeliest token
/exit              leave, as Ctrl-D does; Ctrl-C stops an answer"""


class ChatProblem(ValueError):
    """Why there is no answer; the message says what to do."""


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int  # 0: all tokens
    max_new_tokens: int
    seed: int  # answer n of a conversation is drawn with seed + n, so that two models get the same chances


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    seconds: float  # reading the conversation included
    interrupted: bool = False

    @property
    def speed(self) -> str:
        rate = self.num_tokens / self.seconds if self.seconds > 0 else 0.0
        ended = ", stopped" if self.interrupted else ""
        return f"{self.num_tokens} tokens, {rate:.1f} tokens/s{ended}"


class Speaker(Protocol):
    """A model that answers."""

    name: str

    def answer(
        self,
        messages: list[Message],
        sampling: Sampling,
        tell: Callable[[str], None],  # is given each piece of the answer as it comes
        is_stopped: Callable[[], bool],  # asked after every token
    ) -> Answer:
        """Raises `ChatProblem`."""
        ...


class Screen(Protocol):
    """Where a conversation is shown."""

    def note(self, text: str) -> None: ...

    def begin(self, names: list[str]) -> None: ...

    def piece(self, speaker: int, text: str) -> None: ...

    def end(self, answers: list[Answer]) -> None:
        """Of the speakers in their order; fewer where one had a problem or none was left to ask."""
        ...


class Conversation:
    """Every speaker remembers its own answers."""

    def __init__(
        self, speakers: list[Speaker], screen: Screen, sampling: Sampling, *, system: str | None
    ) -> None:
        self.speakers = speakers
        self.screen = screen
        self.sampling = sampling
        self.system = system
        self.reset()

    def reset(self) -> None:
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.histories: list[list[Message]] = [list(opening) for _ in self.speakers]
        self.num_answers = 0

    def line(self, text: str, is_stopped: Callable[[], bool]) -> bool:
        """What the user typed; False when it was to leave."""
        text = text.strip()
        if text.startswith("/"):
            return self._command(*text[1:].partition(" ")[::2])
        if text:
            self._ask(text, is_stopped)
        return True

    def _command(self, name: str, rest: str) -> bool:
        match name, rest.strip():
            case "exit" | "quit", _:
                return False
            case "reset", _:
                self.reset()
                self.screen.note("a new conversation")
            case "system", prompt:
                self.system = prompt or None
                self.reset()
                self.screen.note(
                    "a new conversation, " + ("with this system prompt" if prompt else "without one")
                )
            case "temperature", number:
                self._set_temperature(number)
            case "help", _:
                self.screen.note(HELP)
            case _:
                self.screen.note(f"no command /{name}\n{HELP}")
        return True

    def _set_temperature(self, number: str) -> None:
        try:
            temperature = float(number)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < float("inf"):
            self.screen.note(f"/temperature {number}: wanted a number >= 0, such as 0.7")
            return
        self.sampling = replace(self.sampling, temperature=temperature)
        self.screen.note(f"temperature {temperature:g}")

    def _ask(self, text: str, is_stopped: Callable[[], bool]) -> None:
        """One speaker after the other: side by side they would halve each other's speed on the same cores."""
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_answers)
        answers: list[Answer] = []
        problem = ""
        self.screen.begin([speaker.name for speaker in self.speakers])
        try:
            for index, (speaker, history) in enumerate(zip(self.speakers, self.histories, strict=True)):
                messages = [*history, {"role": "user", "content": text}]
                tell = partial(self.screen.piece, index)
                answers.append(speaker.answer(messages, sampling, tell, is_stopped))
        except ChatProblem as error:
            problem = str(error)
        finally:
            self.screen.end(answers)
        if problem:  # then nobody has heard the question
            self.screen.note(problem)
            return
        for history, answer in zip(self.histories, answers, strict=True):
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        self.num_answers += 1
