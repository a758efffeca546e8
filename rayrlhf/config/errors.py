"""Converts pydantic's errors to `Problem`s with fixes, and runs the checks that valid fields still allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rayrlhf.config.base import ConfigError, Problem, Section
from rayrlhf.config.help import (
    default_of,
    describe,
    item_of,
    node_of,
    number,
    sections_in,
    show,
    tags_of,
)
from rayrlhf.config.key_suggestions import numbered, parent, siblings, suggest
from rayrlhf.migration.other_keys import answer, known_paths, leaf_problems, meant_by

S = TypeVar("S", bound=Section)

UNKNOWN_KEY = ("extra_forbidden", "invalid_key")  # the second: a key that is not a string
MAX_SHOWN = 100  # characters of a wrong value
BOUND_FIXES = {
    "greater_than_equal": ("ge", "to {} or more"),
    "greater_than": ("gt", "above {}"),
    "less_than_equal": ("le", "to {} or less"),
    "less_than": ("lt", "below {}"),
}


def explain(error: ValidationError, schema: type[Section], values: Mapping[str, Any]) -> list[Problem]:
    """All problems of `values`: unknown keys, invalid values, and valid values that contradict each other."""
    details: list[ErrorDetails] = []
    failed_checks: list[Problem] = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            path = _locate(schema, detail["loc"])[0]
            failed_checks += [replace(p, path=f"{path}.{p.path}" if path else p.path) for p in cause.problems]
        else:
            details.append(detail)
    unknown = [(_locate(schema, e["loc"])[0], e["input"]) for e in details if e["type"] in UNKNOWN_KEY]
    meant = {suggestion for path, value in unknown for suggestion in _meant(schema, path, value)}
    problems: list[Problem] = []
    for detail in details:
        location = detail["loc"]
        missing = detail["type"] == "missing"
        if missing and isinstance(location[-1], int):
            location, missing = location[:-1], False  # a list of two numbers that has only one
        path, node, default = _locate(schema, location)
        if detail["type"] in UNKNOWN_KEY:
            problems += leaf_problems(schema, path, detail["input"]) or [_unknown_key(schema, path, detail)]
        elif missing:
            problems += [p for p in _missing(path, node) if not meant & {p.path, path}]
        else:
            problems.append(_bad_value(path, node, default, detail))
    good = valid_part(schema, values)
    for path in meant:
        _forget(good, path.split("."))  # given under a wrong name, so its value is not the default
    return [*problems, *dict.fromkeys([*failed_checks, *_failed_checks(good)])]


def valid_part(schema: type[S], values: Mapping[str, Any]) -> S:
    """A section with defaults and the valid values only: reading any other field raises AttributeError."""
    part = schema.model_construct(_fields_set={name for name in schema.model_fields if name in values})
    fields = vars(part)
    for name, info in schema.model_fields.items():
        if name not in values:
            continue
        node, value = node_of(info), values[name]
        sections = sections_in(node)
        if sections and isinstance(value, dict):
            fields[name] = valid_part(sections[0], value)
            continue
        try:
            # As strict as its section, unless the field says otherwise; sections have their own config.
            config = None if sections else Section.model_config
            fields[name] = TypeAdapter(node, config=config).validate_python(value)
        except ValidationError:
            fields.pop(name, None)
    return part


def _forget(part: Section, way: Sequence[str]) -> None:
    fields = vars(part)
    if len(way) == 1:
        fields.pop(way[0], None)
    elif isinstance(child := fields.get(way[0]), Section):
        fields[way[0]] = child.model_copy()  # it may be the default that all configs share
        _forget(fields[way[0]], way[1:])


def _failed_checks(part: Section, at: str = "") -> Iterator[Problem]:
    for name, value in vars(part).items():
        if isinstance(value, Section):
            yield from _failed_checks(value, f"{at}{name}.")
    for check in part.checks:
        try:
            problem = check(part)
        except AttributeError:
            continue  # it needs a value that is reported as a problem already
        if problem is not None:
            yield replace(problem, path=at + problem.path)


def _locate(schema: type[Section], location: tuple[int | str, ...]) -> tuple[str, Any, str | None]:
    """Key path, type and default of the value at pydantic's location, which includes union variants."""
    path: list[str] = []
    node: Any = schema
    default = None
    for part in location:
        sections = sections_in(node)
        if isinstance(part, int):
            path.append(str(part))
            node, default = item_of(node), None
        elif len(sections) > 1:
            node = next(section for section in sections if part in tags_of(section))
        else:
            path.append(part)
            info = sections[0].model_fields.get(part) if sections else None
            node = node_of(info) if info else None
            default = show(default_of(info)) if info and not info.is_required() else None
    return ".".join(path), node, default


def _missing(path: str, node: Any) -> Iterator[Problem]:
    """A missing section is reported as its required keys."""
    sections = sections_in(node)
    if len(sections) == 1:
        for name, info in sections[0].model_fields.items():
            if info.is_required():
                yield from _missing(f"{path}.{name}", node_of(info))
        return
    fix = f"add {path} to the YAML, or {path}=... to the command line"
    yield Problem(path, "nothing", describe(node), fix)


def _bad_value(path: str, node: Any, default: str | None, detail: ErrorDetails) -> Problem:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = f"{path}.type"
        tags = [tag for section in sections_in(node) for tag in tags_of(section)]
        got, fix = "nothing", f"say which it is: {path}={tags[0]}"
        if "tag" in context:
            got, fix = _shorten(context["tag"]), _closest(context["tag"], tags, path)
        return Problem(path, got, "one of " + ", ".join(tags), fix)
    return Problem(path, _shorten(value), describe(node), _fix(path, detail, node, default))


def _fix(path: str, detail: ErrorDetails, node: Any, default: str | None) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    example = f", for example {path}={default}, the default" if default not in (None, "null", "[]") else ""
    if kind == "model_type" and (sections := sections_in(node)):
        return f"put its keys below it, as in {path}.{next(iter(sections[0].model_fields))}=..."
    if value is None:
        return (
            f"remove the key to get the default, {default}, or give it a value"
            if default
            else "give it a value"
        )
    if kind in BOUND_FIXES:
        name, words = BOUND_FIXES[kind]
        return f"set {path} {words.format(number(context[name]))}"
    if kind == "literal_error":
        return _closest(value, [show(option) for option in _options(node)], path)
    if kind == "string_type" and isinstance(value, int | float):
        text = show(value)
        return f"put it in quotes: '{text}' in a file, {path}='\"{text}\"' on the command line"
    if kind in ("list_type", "tuple_type"):
        return f"write a list, as in {path}: [...]"
    if kind == "bool_type":
        return "write true or false, without quotes"
    if kind in ("int_type", "float_type", "finite_number"):
        return f"write a plain number, without quotes{example}"
    return f"write {describe(node)}{example}"


def _options(node: Any) -> list[Any]:
    """The values of a `Literal` anywhere inside an annotation."""
    return [
        option
        for part in get_args(node)
        for option in ([part] if isinstance(part, str | int) else _options(part))
    ]


def _closest(value: Any, options: list[str], path: str) -> str:
    close = get_close_matches(str(value).lower(), options, n=1)
    return f"did you mean {close[0]}?" if close else f"set {path} to one of them"


def _shorten(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else show(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _meant(schema: type[Section], path: str, value: Any) -> list[str]:
    """The existing keys that an unknown key, or the keys below it, correspond to."""
    foreign = [
        key for problem in leaf_problems(schema, path, value) for key in meant_by(schema, problem.path)
    ]
    own = [] if answer(schema, path) is None else meant_by(schema, path)
    return foreign or own or suggest(schema, path)


def _unknown_key(schema: type[Section], path: str, detail: ErrorDetails) -> Problem:
    if numbered(path) not in known_paths(schema) and (foreign := answer(schema, path)):
        return Problem(path, _shorten(detail["input"]), "no such key", foreign)
    suggestions = suggest(schema, path)
    if suggestions == [path]:
        fix = "nest it, one section per line: dotted keys are for the command line"
    elif suggestions:
        fix = f"did you mean {' or '.join(suggestions)}?"
    else:
        section = parent(path)
        fix = f"remove it; {section or 'the top level'} has the keys {', '.join(siblings(schema, section))}"
    return Problem(path, _shorten(detail["input"]), "no such key", fix)
