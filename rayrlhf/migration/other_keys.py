"""Maps keys of other projects, and options with dashes, to our keys for error messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from rayrlhf.config.base import Problem, Section
from rayrlhf.config.help import INDEX, keys_of, show
from rayrlhf.config.key_suggestions import suggest
from rayrlhf.migration.table import PROJECTS, Word

MAX_LEAVES = 60  # of a foreign section, each of which is answered separately
Found = list[tuple[str, Word]]


def find_words(path: str) -> Found:
    """(project, word) of every project with such a key: by whole path, last part, or end of the path."""
    path = path.lower().replace("-", "_")
    leaf = path.rpartition(".")[2]
    whole = [(project, word) for project, word in _all_words() if word.theirs == path]
    if whole:
        return whole
    flat = [(project, word) for project, word in _all_words() if word.theirs == leaf]
    if flat:
        return flat
    # verl's paths are long, so they are matched by their ends; a word such as "n" or "path" is ambiguous.
    end = f".{path}" if "." in path else (f".{leaf}" if "_" in leaf else None)
    return [(p, word) for p, word in _all_words() if end is not None and word.theirs.endswith(end)][:1]


def meant_by(schema: type[Section], path: str) -> list[str]:
    """The keys of `schema` that correspond to another project's `path`."""
    known = known_paths(schema)
    return list(dict.fromkeys(key for _, word in find_words(path) for key in word.keys if key in known))


def answer(schema: type[Section] | None, path: str) -> str | None:
    """What to write instead of another project's key; None if no project has it, or if it is ours too."""
    known = known_paths(schema) if schema is not None else None
    found = find_words(path)
    if known is not None and path.rpartition(".")[2] in {key.rpartition(".")[2] for key in known}:
        found = [(project, word) for project, word in found if "." in word.theirs]
    merged: dict[Word, list[str]] = {}
    for project, word in found:
        merged.setdefault(word, []).append(project)
    fitting = [word for word in merged if known is None or not word.ours or known & set(word.keys)]
    return "; ".join(_fix_of(word, merged[word], known) for word in fitting or merged) or None


def _fix_of(word: Word, projects: list[str], known: frozenset[str] | None) -> str:
    here = [text for text in word.ours if known is None or text.partition("=")[0] in known]
    whose = f"{word.theirs} in {' and '.join(projects)}"
    if here:
        return f"use {' or '.join(here)} ({whose})" + (f": {word.how}" if word.how else "")
    if word.ours:
        return f"remove it: this job has no {' or '.join(word.keys)} ({whose})"
    return f"{word.how} ({whose})"


def leaf_problems(schema: type[Section], path: str, value: Any) -> list[Problem]:
    """A problem for every key below a foreign section, if any of them is another project's; else none."""
    if not isinstance(value, Mapping) or not value:
        return []
    leaves = list(_leaves(path, value))[:MAX_LEAVES]
    if not any(find_words(leaf) for leaf, _ in leaves):
        return []
    return [
        Problem(
            leaf,
            show(given)[:100],
            "no such key",
            answer(schema, leaf) or "remove it: it has no counterpart here",
        )
        for leaf, given in leaves
    ]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(f"{path}.{key}", child)
    else:
        yield path, value


def option_problem(schema: type[Section] | None, option: str, value: str | None, where: str) -> Problem:
    """`--learning_rate 1e-5` and the like: what to write."""
    key = option.lstrip("-+~").replace("-", "_")
    got = "an option" if value is None else f"an option with the value {value}"
    return Problem(
        option, got, "YAML files, key.path=value, or --help", _option_fix(schema, key, value), where
    )


def _option_fix(schema: type[Section] | None, key: str, value: str | None) -> str:
    override = key if value is None else f"{key}={value}"
    known = known_paths(schema) if schema is not None else frozenset()
    numbered = ".".join(INDEX if part.isdecimal() else part for part in key.split("."))
    if numbered not in known:
        if fix := answer(schema, key):
            return fix
        if schema is not None and (near := suggest(schema, key)):
            return f"did you mean {' or '.join(near)}? Write it as {near[0]}={value or 'VALUE'}"
    is_path = all(part.isidentifier() or part.isdecimal() for part in key.split("."))
    return f"write {override}, without dashes" if is_path and value is not None else "leave it out"


@lru_cache(maxsize=1)
def _all_words() -> tuple[tuple[str, Word], ...]:
    return tuple((project, word) for project, words in PROJECTS.items() for word in words)


@lru_cache(maxsize=32)
def known_paths(schema: type[Section]) -> frozenset[str]:
    return frozenset(key.path for key in keys_of(schema))
