"""Conversations: histories, commands, and the state after a problem."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rayrlhf.commands.chat.conversation import Answer, ChatProblem, Conversation, Message, Sampling, Speaker

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=8, seed=5)


class Echo:
    """Answers in capitals, and keeps what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[list[Message]] = []
        self.sampling: list[Sampling] = []

    def answer(
        self,
        messages: list[Message],
        sampling: Sampling,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Answer:
        self.asked.append(messages)
        self.sampling.append(sampling)
        if messages[-1]["content"] == "too long":
            raise ChatProblem("no room: /reset")
        text = f"{self.name} {messages[-1]['content'].upper()}"
        on_text(text)
        return Answer(text, num_tokens=10, seconds=2.0, interrupted=is_stopped())


class Recorder:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.pieces: list[tuple[int, str]] = []
        self.answers: list[list[Answer]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, names: list[str]) -> None: ...

    def piece(self, speaker: int, text: str) -> None:
        self.pieces.append((speaker, text))

    def end(self, answers: list[Answer]) -> None:
        self.answers.append(answers)


def talk(*lines: str, names: tuple[str, ...] = ("a",), system: str | None = None, stopped: bool = False):
    speakers = [Echo(name) for name in names]
    screen = Recorder()
    typed: list[Speaker] = [*speakers]
    conversation = Conversation(typed, screen, SAMPLING, system=system)
    stayed = [conversation.line(line, lambda: stopped) for line in lines]
    return speakers, screen, stayed


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_every_speaker_remembers_its_own_answers() -> None:
    speakers, screen, _ = talk("hi\n", "  ", "so", names=("base", "tuned"))
    for speaker in speakers:
        assert speaker.asked == [[user("hi")], [user("hi"), assistant(f"{speaker.name} HI"), user("so")]]
    assert screen.pieces == [(0, "base HI"), (1, "tuned HI"), (0, "base SO"), (1, "tuned SO")]
    assert speakers[0].sampling == speakers[1].sampling
    assert [sampling.seed for sampling in speakers[0].sampling] == [5, 6]


def test_reset_and_system_start_a_new_conversation() -> None:
    [echo], _, _ = talk("a", "/reset", "b", "/system Be kind.", "c", "/system", "d", system="Be brief.")
    brief, kind = ({"role": "system", "content": text} for text in ("Be brief.", "Be kind."))
    assert echo.asked == [[brief, user("a")], [brief, user("b")], [kind, user("c")], [user("d")]]


@pytest.mark.parametrize("number", ["-1", "hot", "nan", "inf", ""])
def test_a_temperature_that_is_none_changes_nothing(number: str) -> None:
    [echo], screen, _ = talk("/temperature 0", "a", f"/temperature {number}", "b")
    assert [sampling.temperature for sampling in echo.sampling] == [0.0, 0.0]
    assert "wanted a number >= 0" in screen.notes[-1]


def test_leaving_and_what_is_no_command() -> None:
    [echo], screen, stayed = talk("/exit", "/quit", "/exits", "/help")
    assert stayed == [False, False, True, True] and not echo.asked
    assert screen.notes[0].startswith("no command /exits") and "/temperature" in screen.notes[1]


def test_a_question_without_an_answer_is_forgotten_by_all() -> None:
    speakers, screen, _ = talk("hi", "too long", "so", names=("base", "tuned"))
    assert [len(messages) for messages in speakers[0].asked] == [1, 3, 3]
    assert len(speakers[1].asked) == 2 and len(speakers[1].asked[1]) == 3
    assert screen.notes == ["no room: /reset"]


def test_a_stopped_answer_is_remembered_as_far_as_it_came() -> None:
    [echo], screen, _ = talk("hi", "so", stopped=True)
    assert echo.asked[1][1] == assistant("a HI")
    assert screen.answers[0][0].speed == "10 tokens, 5.0 tokens/s, stopped"
