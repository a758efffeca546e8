"""Describes what a schema accepts: the key reference of `--help`, and the `wanted` of error messages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rayrlhf.config.base import Meanings, Section, Wanted

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
INDEX = "N"  # placeholder for the index of a list item in key paths
HELP_WIDTH = 100


@dataclass(frozen=True)
class Key:
    """One key of a schema."""

    path: str
    wanted: str
    default: str  # as it is written in YAML; empty for sections and required keys
    doc: str
    is_section: bool
    meanings: Mapping[str, str] = field(default_factory=dict)  # of its choices


def keys_of(schema: type[Section], at: str = "", defaults: Section | None = None) -> Iterator[Key]:
    """All keys below `schema`, depth first, with sections; `defaults`: values set by their parent."""
    for name, info in schema.model_fields.items():
        path = f"{at}.{name}" if at else name
        node = node_of(info)
        sections = sections_in(node)
        default = None
        if defaults is not None:
            default = getattr(defaults, name)
        elif not info.is_required():
            default = default_of(info)
        required = defaults is None and info.is_required()
        text = "" if required or sections else show(default)
        meanings = next((m.of_choice for m in info.metadata if isinstance(m, Meanings)), {})
        yield Key(path, describe(node), text, info.description or "", bool(sections), meanings)
        if sections:
            yield from keys_of(sections[0], path, default if isinstance(default, Section) else None)
            continue
        known: set[str] = set()
        for variant in sections_in(item_of(node)):
            for key in keys_of(variant, f"{path}.{INDEX}"):
                if key.path not in known:
                    known.add(key.path)
                    yield key


def node_of(info: FieldInfo) -> Any:
    """A field's annotation together with its metadata, which pydantic stores separately."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def sections_in(node: Any) -> list[type[Section]]:
    """This type if it is a section, or the variants of a union of sections; empty for other types."""
    if get_origin(node) is Annotated:
        return sections_in(get_args(node)[0])
    if get_origin(node) in (Union, UnionType):
        return [section for part in get_args(node) for section in sections_in(part)]
    return [node] if isinstance(node, type) and issubclass(node, Section) else []


def item_of(node: Any) -> Any:
    """The item type of a list or a pair; None for other types."""
    if get_origin(node) is Annotated:
        return item_of(get_args(node)[0])
    if get_origin(node) in (Union, UnionType):
        return next((item for part in get_args(node) if (item := item_of(part)) is not None), None)
    return get_args(node)[0] if get_origin(node) in (list, tuple) else None


def describe(node: Any, bounds: Iterable[str] = ()) -> str:
    """What a value of this type looks like: `an integer >= 1`, `one of ppo, reinforce`."""
    origin, parts = get_origin(node), get_args(node)
    if origin is Annotated:
        said = next((m.text for m in parts[1:] if isinstance(m, Wanted)), None)
        return said or describe(parts[0], [*bounds, *_bounds(parts[1:])])
    if origin in (Union, UnionType):
        sections = sections_in(node)
        if len(sections) > 1:
            return "a section with type: " + " or ".join(
                tag for section in sections for tag in tags_of(section)
            )
        words = " or ".join(describe(part, bounds) for part in parts if part is not NoneType)
        return f"{words}, or null" if NoneType in parts else words
    if origin is Literal:
        return "one of " + ", ".join(map(show, parts))
    if origin is list:
        return " ".join(["a list", *bounds]) + f" (each item {describe(parts[0])})"
    if origin is tuple:
        return f"a list of {len(parts)} (each {describe(parts[0])})"
    if sections := sections_in(node):
        return "a section with the keys " + ", ".join(sections[0].model_fields)
    return " ".join([TYPE_NAMES.get(node, "a value"), " and ".join(bounds)]).strip()


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
            continue
        for name, sign in BOUNDS.items():
            bound = getattr(item, name, None)
            if bound is not None:
                yield f"{sign} {number(bound)}"
        if getattr(item, "min_length", None):
            yield "that is not empty"


def number(value: float) -> str:
    """`0.5` or `2147483648`, not 2.14748e+09."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"


def tags_of(variant: type[Section]) -> tuple[str, ...]:
    """The values of `type` in this variant of a union."""
    return get_args(variant.model_fields["type"].annotation)


def default_of(info: FieldInfo) -> Any:
    """The default of a field, which must not be required."""
    return info.get_default(call_default_factory=True)


def show(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return str(value) if value != "" else "''"


def help_text(schema: type[Section], program: str) -> str:
    """Usage, and every key with accepted values, default and meaning."""
    lines = [
        f"usage: {program} CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]",
        "",
        "Files are merged from left to right, later ones winning; key.path=value overrides them, for example",
        f"  {program} config.yaml train.lr=1e-6 rollout.sampling.stop='[\"###\"]' reward.sources.0.weight=2",
        "",
        f"Keys ({INDEX} is the index of a list item):",
    ]
    for key in keys_of(schema):
        if key.is_section:
            lines += ["", f"{key.path}: {key.doc}"]
            continue
        default = f"default {key.default}" if key.default else "required"
        lines.append(f"  {key.path}  [{key.wanted}; {default}]")
        lines += textwrap.wrap(key.doc, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [f"        {choice}: {meaning}" for choice, meaning in key.meanings.items()]
    return "\n".join(lines)
