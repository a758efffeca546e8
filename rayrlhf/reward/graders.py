"""Graders of verifiable answers. They run in separate processes (`grader_host`), on untrusted input: a model
may write an expression that takes forever, or all memory.

A grader takes a request, a plain JSON object, and returns a number. It raises `UnusableRow` if the data row,
not the response, is at fault. Without a `response` (null) it only checks the row.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Grader = Callable[[dict[str, Any]], float]

# reasoning-gym's generators import these, which scoring never uses: a SAT solver, which must be compiled, and
# cellular automata, which depend on matplotlib.
UNUSED_BY_SCORERS = ("pycosat", "cellpylib")
# They compare grids with tuples of tuples, which JSON turns into lists: a correct answer would be wrong.
COMPARE_TUPLES = ("arc_agi", "rearc")
# Answers are at the end, and math-verify's time is quadratic in a text like "5 5 5 5 …": 2 s at this length.
READ_CHARACTERS = 16_000


class UnusableRow(ValueError):
    """The data row does not hold what the grader needs."""


def load_math() -> Grader:
    """1 if the response's answer equals the label, else 0: {"label": …, "response": …}."""
    # math-verify warns that its time limit is off. It must be off: it uses signals, and the process has a
    # deadline.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse, verify

    def grade(request: dict[str, Any]) -> float:
        label, response = request["label"], request["response"]
        gold = parse(gold_text(label), fallback_mode="no_fallback", parsing_timeout=0)
        if not gold:
            raise UnusableRow(f"{label!r:.80} is not an answer that math-verify can parse")
        if response is None:
            return 1.0
        found = parse(response[-READ_CHARACTERS:], parsing_timeout=0)
        return float(verify(gold, found, timeout_seconds=0))

    return grade


def gold_text(label: Any) -> str:
    """The label in the form that math-verify parses best: LaTeX needs delimiters, or only single numbers
    would be found.

    Of a worked solution as in GSM8K, the part after the last ####.
    """
    if label is None or isinstance(label, bool | list | dict):
        raise UnusableRow(f"{label!r:.80} is not an answer; wanted a text or a number")
    text = str(label).rpartition("####")[2].strip()
    delimited = any(mark in text for mark in ("$", r"\boxed", r"\(", r"\["))
    return text if delimited or not text else rf"\boxed{{{text}}}"


def load_reasoning_gym() -> Grader:
    """The score by the data set's scorer: {"dataset": …, "entry": {…}, "response": …}."""
    gym = import_reasoning_gym()
    scorers: dict[str, Callable[[Any, dict[str, Any]], float]] = {}

    def grade(request: dict[str, Any]) -> float:
        name, entry, response = request["dataset"], entry_of(request), request["response"]
        if name not in scorers:
            try:
                scorers[name] = gym.get_score_answer_fn(name)
            except ValueError as error:
                raise UnusableRow(f"reasoning-gym has no data set {name!r}") from error
        score = scorers[name]
        if response is not None:
            try:
                return float(score(request["answer"], entry))
            except Exception:
                # Some scorers raise on an answer they cannot parse. It is wrong, unless the row is broken.
                _own_score(score, name, entry)
                return 0.0
        return _own_score(score, name, entry)

    return grade


def _own_score(score: Callable[[Any, dict[str, Any]], float], name: str, entry: dict[str, Any]) -> float:
    """The score of the row's own answer. Some rows have none, since many answers are correct."""
    try:
        own = float(score(entry["answer"], entry))
    except Exception as error:
        raise UnusableRow(
            f"the scorer of {name!r} cannot use the row's columns answer and metadata "
            f"({type(error).__name__}: {error})"
        ) from error
    if entry["answer"] is not None and own < 0.99:
        raise UnusableRow(f"the row's own answer gets {own:g} from the scorer of {name!r}; wanted 1")
    return own


def entry_of(request: dict[str, Any]) -> dict[str, Any]:
    """The row in reasoning-gym's original form."""
    entry = dict(request["entry"])
    if request["dataset"] in COMPARE_TUPLES:
        entry["metadata"] = _with_tuples(entry["metadata"])
    return entry


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


class _Absent(ModuleType):
    """Placeholder for a package that is imported but never used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # for lookups of the import system
        raise ImportError(f"{self.__name__} is not installed (asked for {self.__name__}.{name})")


def import_reasoning_gym() -> Any:
    """The package, even if dependencies that only its generators use are missing.

    Raises `ImportError`.
    """
    for name in UNUSED_BY_SCORERS:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = _Absent(name)
    import reasoning_gym

    return reasoning_gym


GRADERS: dict[str, Callable[[], Grader]] = {"math": load_math, "reasoning_gym": load_reasoning_gym}
