"""State of a conversation with one model, or with two side by side. Independent of torch and the terminal."""

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
    """There is no answer; the message says why and what to do."""


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int  # 0: all tokens
    max_new_tokens: int
    seed: int  # answer n of a conversation is sampled with seed + n, the same for both models


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    seconds: float  # prefill included
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
        on_text: Callable[[str], None],  # called with each piece of the answer
        is_stopped: Callable[[], bool],  # called after every token
    ) -> Answer:
        """Raises `ChatProblem`."""
        ...


class Screen(Protocol):
    """Where a conversation is shown."""

    def note(self, text: str) -> None: ...

    def begin(self, names: list[str]) -> None: ...

    def piece(self, speaker: int, text: str) -> None: ...

    def end(self, answers: list[Answer]) -> None:
        """`answers` of the speakers in order; fewer if one failed, after which the others are not asked."""
        ...


class Conversation:
    """The histories of all speakers, each with its own answers."""

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
        """Process a typed line. Returns False if it was the command to exit."""
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
        """One speaker after the other: in parallel they would halve each other's speed on the same cores."""
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_answers)
        answers: list[Answer] = []
        problem = ""
        self.screen.begin([speaker.name for speaker in self.speakers])
        try:
            for index, (speaker, history) in enumerate(zip(self.speakers, self.histories, strict=True)):
                messages = [*history, {"role": "user", "content": text}]
                on_text = partial(self.screen.piece, index)
                answers.append(speaker.answer(messages, sampling, on_text, is_stopped))
        except ChatProblem as error:
            problem = str(error)
        finally:
            self.screen.end(answers)
        if problem:  # then the question is in no history
            self.screen.note(problem)
            return
        for history, answer in zip(self.histories, answers, strict=True):
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        self.num_answers += 1
