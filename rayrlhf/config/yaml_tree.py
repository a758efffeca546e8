"""Reads YAML files and `key.path=value` overrides into one tree of plain values, with their locations."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.config.base import Problem

COMMAND_LINE = "command line"
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
OPTION = re.compile(r"-|[+~]+[A-Za-z_]")  # --key, and Hydra's prefixes of a key
# Limits per file. YAML aliases can expand a few lines to billions of values.
MAX_BYTES = 2**20
MAX_VALUES = 10_000
MAX_DEPTH = 40
MAX_DIGITS = 30


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `1e-6` is a number, while `no`, `1:30` and `2026-01-01` are strings."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or `_Loader` would parse as another type."""


_FLOAT = r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {}
for _type, _pattern, _first_characters in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _tag, _regexp = f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(_tag, _regexp, _first_characters)


def _integer(_loader: _Loader, node: yaml.Node) -> int:
    text = str(node.value).replace("_", "")
    if len(text) > MAX_DIGITS:  # Python refuses to parse thousands of digits
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    return int(text)


# The types of JSON only: no dates, no sets, no objects.
_PLAIN = ("null", "bool", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


@dataclass
class ConfigTree:
    """The values read. `unreadable`: parts are missing, so that the rest cannot be validated."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # key path -> file:line, or the command line
    problems: list[Problem] = field(default_factory=list)
    options: list[tuple[str, str | None]] = field(default_factory=list)  # --key [value]; none is accepted
    sources: list[str] = field(default_factory=list)  # YAML files
    num_overrides: int = 0
    unreadable: bool = False

    @property
    def source(self) -> str:
        """`demo.yaml + 2 overrides`"""
        overrides = f"{self.num_overrides} override{'s' if self.num_overrides > 1 else ''}"
        return " + ".join([*self.sources, *([overrides] if self.num_overrides else [])])


def read_tree(arguments: Sequence[str]) -> ConfigTree:
    """Merge files from left to right, later ones winning, then apply the overrides in their order.

    Mappings are merged key by key; lists and scalars are replaced. Problems are collected, none is raised.
    """
    tree = ConfigTree()
    overrides: list[str] = []
    expects_value = False  # of the option before
    for argument in arguments:
        is_file = argument.endswith((".yaml", ".yml"))
        is_value = expects_value and not (is_file or OVERRIDE.match(argument) or OPTION.match(argument))
        if is_value:
            tree.options[-1] = (tree.options[-1][0], argument)
        expects_value = False
        if is_value:
            continue
        if OVERRIDE.match(argument):
            overrides.append(argument)
        elif OPTION.match(argument):
            name, equals, value = argument.partition("=")
            tree.options.append((name, value if equals else None))
            expects_value = not equals
        elif argument.endswith((".yaml", ".yml")) or Path(argument).exists():
            tree.sources.append(argument)
            _read_file(tree, argument)
        else:
            tree.problems.append(_neither_file_nor_override(argument))
    for override in overrides:
        tree.num_overrides += 1
        _apply_override(tree, override)
    return tree


def _neither_file_nor_override(argument: str) -> Problem:
    if "=" in argument:
        wanted, fix = "key.path=value", "name the key by its path, as in train.num_steps=10"
    else:
        wanted = "a YAML file (.yaml, .yml) or key.path=value"
        fix = f"check the name (there is no such file), or write {argument}=VALUE for an override"
    return Problem(argument, "neither a YAML file nor an override", wanted, fix, COMMAND_LINE)


def _read_file(tree: ConfigTree, path: str) -> None:
    """Merge the file into the tree; mark the tree as unreadable if that fails."""
    try:
        values, places, duplicates = _parse(_read_text(path), path)
    except FileNotFoundError:
        problem = Problem(
            path, "no such file", "a YAML file", f"correct the path; it was looked up in {Path.cwd()}"
        )
    except (OSError, ValueError) as error:
        problem = Problem(path, str(error), "a YAML file in UTF-8", "make it a readable text file")
    except yaml.YAMLError as error:
        problem = _broken_yaml(path, error)
    else:
        if values is None:
            values = {}  # an empty file, or one with comments only
        if isinstance(values, dict):
            tree.problems += duplicates
            tree.values = _merged(tree.values, values)
            tree.places |= places
            return
        problem = Problem(
            path,
            got=f"{kind(values)} at the top level",
            wanted="sections with keys, as in model: {path: ...}",
            fix="put the keys under the name of their section",
        )
    tree.unreadable = True
    tree.problems.append(problem)


def _read_text(path: str) -> str:
    """Raises `OSError`, and `ValueError` for a file that is not text or too large for a configuration."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes, which is no configuration")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("text in UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise ValueError(f"no text: a zero byte at position {content.index(0) + 1}")
    return content.decode("utf-8")


def _broken_yaml(path: str, error: yaml.YAMLError) -> Problem:
    said = getattr(error, "problem", None) or str(error)
    context, mark = getattr(error, "context", None), getattr(error, "problem_mark", None)
    if mark is None:
        return Problem(path, f"broken YAML: {said}", "YAML", "correct it")
    if "tag" in said:
        fix = "remove the tag (!…): texts, numbers, true, false, null, lists and sections need none"
        return Problem(path, f"{said} in line {mark.line + 1}", "plain YAML", fix, f"{path}:{mark.line + 1}")
    snippet = (mark.get_snippet(indent=0) or "").partition("\n")[0].strip()
    return Problem(
        path,
        got=f"broken YAML in line {mark.line + 1}: {snippet!r}",
        wanted=f"YAML ({said}{f', {context}' if context else ''})",
        fix=f"correct line {mark.line + 1} or the one before it: indentation, quotes, or a missing ':'",
        where=f"{path}:{mark.line + 1}",
    )


def _parse(text: str, file: str) -> tuple[Any, dict[str, str], list[Problem]]:
    """Values, the location of every key path, and duplicate keys. Raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        places: dict[str, str] = {}
        duplicates: list[Problem] = []
        _walk(node, "", file, places, duplicates)
        return _constructed(loader, node), places, duplicates
    except RecursionError:
        raise yaml.YAMLError("nested too deeply, or an alias (*name) inside its own anchor (&name)") from None
    finally:
        loader.dispose()


def _constructed(loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ValueError, LookupError) as error:  # `!!int x`
        tag = "a value that its tag (!!…) does not fit"
        raise yaml.constructor.ConstructorError(None, None, f"{tag}: {error}", node.start_mark) from error


def _walk(
    node: yaml.Node, path: str, file: str, places: dict[str, str], duplicates: list[Problem], depth: int = 0
) -> None:
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
    children: list[tuple[str, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), item.start_mark.line + 1, item) for i, item in enumerate(node.value)]
    lines: dict[str, int] = {}
    for key, line, value in children:
        child = f"{path}.{key}" if path else key
        if key in lines and key != "<<":
            duplicates.append(
                Problem(
                    child,
                    got=f"given twice, in lines {lines[key]} and {line}",
                    wanted="every key once: YAML would silently take the last",
                    fix="merge the two, or remove one",
                    where=f"{file}:{line}",
                )
            )
        lines[key] = line
        places[child] = f"{file}:{line}"
        if len(places) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values once its aliases (*name) are followed")
        _walk(value, child, file, places, duplicates, depth + 1)


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(tree: ConfigTree, override: str) -> None:
    """Set one value in the tree; missing sections are created, list items are addressed by their index."""
    path, _, text = override.partition("=")
    try:
        value, places, duplicates = _parse(text, COMMAND_LINE)
        tree.values = _with_value(tree.values, path.split("."), value, ())
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or str(error)
        fix = f"put quotes around it: {path}='{json.dumps(text)}'"
        tree.problems.append(Problem(path, f"{text} ({said})", "a YAML value", fix, COMMAND_LINE))
    except LookupError as error:
        got, wanted, fix = error.args
        tree.problems.append(Problem(path, got, wanted, fix, COMMAND_LINE))
    else:
        tree.problems += duplicates
        # The value is replaced as a whole, so the former locations of its parts no longer apply.
        kept = {key: place for key, place in tree.places.items() if not key.startswith(f"{path}.")}
        tree.places = kept | {path: COMMAND_LINE} | {f"{path}.{key}": COMMAND_LINE for key in places}


def _with_value(node: Any, way: Sequence[str], value: Any, passed: tuple[str, ...]) -> Any:
    """A copy of `node` with `value` at the end of `way`; a copy, since YAML anchors may share nodes.

    Raises `LookupError` (got, wanted, fix) if the path does not exist.
    """
    if not way:
        return value
    here, key = ".".join(passed), way[0]
    if node is None:
        node = {}
    if isinstance(node, dict):
        return node | {key: _with_value(node.get(key), way[1:], value, (*passed, key))}
    if not isinstance(node, list):
        raise LookupError(
            f"a path through {here}, which is {kind(node)}: {node!r}",
            "a key below a section or a list",
            f"correct the path, or give {here} as a whole: {here}=...",
        )
    if not key.isdecimal() or int(key) >= len(node):
        raise LookupError(
            f"item {key} of {here}, which has {len(node)}",
            f"an index from 0 to {len(node) - 1}" if node else f"an item that exists; {here} is empty",
            f"correct the index, or give {here} as a whole: {here}=[...]",
        )
    index = int(key)
    changed = _with_value(node[index], way[1:], value, (*passed, key))
    return [*node[:index], changed, *node[index + 1 :]]


def write_tree(values: dict[str, Any]) -> str:
    """YAML that `read_tree` and other parsers read the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def kind(value: Any) -> str:
    """The type of a YAML value, for messages."""
    words = {dict: "a section", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")
