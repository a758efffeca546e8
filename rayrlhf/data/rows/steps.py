"""Rows for process reward models: the steps of a solution, each with a label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.config.example_data import PrmDataConfig
from rayrlhf.data.rows.columns import PROMPT_NAMES, Shape, pick, pick_or_fail, recognise
from rayrlhf.data.rows.images import has_placeholders
from rayrlhf.data.rows.messages import Message, check_turns, conversation_with, prompt_messages
from rayrlhf.data.rows.row import BadRow, check_text, column_of, type_name

PROBLEM_NAMES = (*PROMPT_NAMES, "problem")
STEPS_NAMES = ("steps", "completions")
LABELS_NAMES = ("labels", "ratings")
SHEPHERD_MARK = "ки"  # ends a step in Math-Shepherd's texts (arXiv 2312.08935)
WORDS = {"+": 1.0, "-": 0.0, "good": 1.0, "bad": 0.0, "true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Steps:
    """A solution split into steps; a label is the correctness of a step from 0 to 1, None if unknown."""

    prompt: list[Message]
    steps: list[str]
    labels: list[float | None]  # one per step
    tools: list[dict[str, Any]] | None = None


def steps_of(columns: Mapping[str, Any], config: PrmDataConfig) -> Steps:
    """The labelled steps in a row. Raises `BadRow`."""
    format_ = config.format if config.format != "auto" else _recognised(columns, config)
    scale = config.label_scale
    if format_ == "prm800k":
        problem, steps, labels = _prm800k(columns)
        scale = "rating" if scale == "auto" else scale
    elif format_ == "math_shepherd":
        problem, steps, labels = _math_shepherd(columns)
    else:
        prompt_key = pick_or_fail(columns, config.prompt_key, PROBLEM_NAMES, "data.prompt_key")
        steps_key = pick_or_fail(columns, config.steps_key, STEPS_NAMES, "data.steps_key")
        labels_key = pick_or_fail(columns, config.labels_key, LABELS_NAMES, "data.labels_key")
        problem, steps, labels = columns[prompt_key], columns[steps_key], columns[labels_key]
        for key, value in ((steps_key, steps), (labels_key, labels)):
            if not isinstance(value, list):
                raise BadRow(f"column {key!r} holds {type_name(value)}; wanted a list, one entry per step")
    conversation = conversation_with(prompt_messages(problem, "the problem"), columns, config)
    prompt = conversation.messages
    check_turns([*prompt, {"role": "assistant", "content": "steps"}], "the problem")
    if has_placeholders(prompt):
        raise BadRow("its problem has images, which process reward models are not trained on")
    _check_steps(steps, labels, config.step_token)
    read = [_label(label, number, scale, config) for number, label in enumerate(labels, start=1)]
    if all(label is None for label in read):
        raise BadRow("no step has a label")
    return Steps(prompt, list(steps), read, conversation.tools)


def _recognised(columns: Mapping[str, Any], config: PrmDataConfig) -> str:
    keys_given = config.steps_key is not None or config.labels_key is not None
    listed = all(
        pick(columns, key, names) is not None
        for key, names in (
            (config.prompt_key, PROBLEM_NAMES),
            (config.steps_key, STEPS_NAMES),
            (config.labels_key, LABELS_NAMES),
        )
    )
    nested = isinstance(columns.get("question"), dict) and isinstance(columns.get("label"), dict)
    marked = isinstance(columns.get("input"), str) and isinstance(columns.get("label"), str)
    names = f"{'/'.join(PROBLEM_NAMES)}, {'/'.join(STEPS_NAMES)} and {'/'.join(LABELS_NAMES)}"
    shapes = [
        Shape("steps", names, listed, keys_given),
        Shape("prm800k", "question and label, objects", nested),
        Shape("math_shepherd", "input and label, texts", marked),
    ]
    return recognise(columns, shapes)


def _check_steps(steps: Sequence[Any], labels: Sequence[Any], step_token: str) -> None:
    if not steps:
        raise BadRow("there are no steps")
    if len(labels) != len(steps):
        raise BadRow(f"{len(labels)} labels for {len(steps)} steps; wanted one per step")
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise BadRow(f"step {number} is {type_name(step)}; wanted a text")
        check_text(step, f"step {number}")
        if step_token in step:
            raise BadRow(
                f"step {number} contains data.step_token={step_token!r}, which would end it too early; "
                "remove it from the data, or choose another token"
            )


def _label(value: Any, number: int, scale: str, config: PrmDataConfig) -> float | None:
    if scale == "rating":
        neutral = {"positive": 1.0, "negative": 0.0, "half": 0.5, "ignore": None}[config.neutral]
        if value is None:  # PRM800K's labellers skipped some steps
            return None
        if not isinstance(value, bool) and value in (-1, 0, 1):
            return {-1: 0.0, 0: neutral, 1: 1.0}[int(value)]
        raise BadRow(f"the label of step {number} is {value!r}; wanted a rating: -1, 0 or 1")
    if isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    if isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= 1:
        return float(value)
    hint = "; for ratings of -1, 0 and 1 set data.label_scale=rating" if value == -1 else ""
    raise BadRow(
        f"the label of step {number} is {value!r}; "
        f"wanted true or false, + or -, good or bad, or a number from 0 to 1{hint}"
    )


def _prm800k(columns: Mapping[str, Any]) -> tuple[Any, list[Any], list[Any]]:
    """The path of steps that the labellers followed (arXiv 2305.20050): the chosen completion of each step.

    If none was chosen, which ends most solutions, it is the completion written by hand, else the first.
    """
    question = column_of(columns, "question", "data.format=prm800k")
    label = column_of(columns, "label", "data.format=prm800k")
    try:
        problem, steps = question["problem"], label["steps"]
        path = [completion for step in steps if (completion := _followed(step)) is not None]
        return problem, [each["text"] for each in path], [each["rating"] for each in path]
    except (KeyError, TypeError, IndexError) as error:
        raise BadRow(
            f"it is not in PRM800K's format ({error!r}); wanted question.problem and "
            "label.steps[].completions[] with text and rating"
        ) from error


def _followed(step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    chosen, by_hand = step.get("chosen_completion"), step.get("human_completion")
    if chosen is not None:
        return step["completions"][chosen]
    if by_hand is not None:
        text = by_hand["text"] if isinstance(by_hand, Mapping) else by_hand
        return {"text": text, "rating": 1}
    return step["completions"][0] if step["completions"] else None


def _math_shepherd(columns: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """`input` with a mark after every step, and `label`, the same text with + or - instead of the marks."""
    text = column_of(columns, "input", "data.format=math_shepherd")
    labelled = column_of(columns, "label", "data.format=math_shepherd")
    if not isinstance(text, str) or not isinstance(labelled, str):
        raise BadRow(
            f"columns 'input' and 'label' hold {type_name(text)} and {type_name(labelled)}; wanted texts"
        )
    *steps, rest = text.split(SHEPHERD_MARK)
    labels, position = [], 0
    for number, step in enumerate(steps, start=1):
        position += len(step)
        if labelled[:position].endswith(step) and labelled[position : position + 1] in ("+", "-"):
            labels.append(labelled[position])
            position += 1
        else:
            raise BadRow(f"column 'label' has no + or - after step {number} of column 'input'")
    if not steps:
        raise BadRow(f"column 'input' has no step that ends with {SHEPHERD_MARK!r}")
    if rest.strip():
        raise BadRow(f"column 'input' has text after its last mark {SHEPHERD_MARK!r}")
    problem, found, first = steps[0].partition("Step 1:")
    if not found:
        raise BadRow("column 'input' has no 'Step 1:', which begins the solution")
    return problem.strip(), [found + first, *steps[1:]], labels
