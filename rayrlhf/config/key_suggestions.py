"""Which existing key an unknown one is probably meant to be."""

from __future__ import annotations

from difflib import get_close_matches

from rayrlhf.config.base import Section
from rayrlhf.config.help import INDEX, keys_of

# Keys of earlier versions of rayrlhf whose new name is not similar enough to be found.
RENAMED = {"algorithm.dynamic_sampling.max_draws": "algorithm.dynamic_sampling.max_prompt_batches"}


def suggest(schema: type[Section], path: str) -> list[str]:
    """Existing key paths that `path` probably means: its new name, a similar one, or the same elsewhere."""
    paths = [key.path for key in keys_of(schema)]
    if RENAMED.get(path) in paths:
        return [RENAMED[path]]
    section, name = parent(path), leaf(path)
    if numbered(path) in paths:
        return [path]  # written with dots inside a YAML file
    near = siblings(schema, section)
    for cutoff in (0.75, 0.6):
        if close := get_close_matches(name, near, n=1, cutoff=cutoff):
            return [f"{section}.{close[0]}" if section else close[0]]
        if same := [p for p in paths if leaf(p) == name]:
            return [p for p in same if p.startswith(numbered(section) + ".")] or same[:2]
    far = get_close_matches(name, {leaf(p) for p in paths}, n=1, cutoff=0.8)
    others = [p for p in paths if not numbered(path).startswith(f"{p}.")]  # not the section it is in
    return [p for p in paths if leaf(p) in far][:2] or get_close_matches(path, others, n=1, cutoff=0.8)


def siblings(schema: type[Section], section: str) -> list[str]:
    return [leaf(key.path) for key in keys_of(schema) if parent(key.path) == numbered(section)]


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


def numbered(path: str) -> str:
    """`reward.sources.0.weight` as it is in the key reference, `reward.sources.N.weight`."""
    return ".".join(INDEX if part.isdecimal() else part for part in path.split("."))
