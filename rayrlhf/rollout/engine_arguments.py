"""`rollout.engine_args`: arguments that engines give to vLLM as they are, checked before anything is loaded.

vLLM itself is not imported, which would take a driver ten seconds: the names and types are read from the
source of its `EngineArgs`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayrlhf.config.base import ConfigError, Problem

KEY = "rollout.engine_args"
PLAIN = {"bool": bool, "int": int, "float": float, "str": str}
# On CPUs; each with the reason.
FIXED_ON_CPUS = {
    "enable_chunked_prefill": "vLLM's CPU engine cannot continue a seeded request's prompt in a second step",
    "enforce_eager": "torch.compile is off in engines on CPUs",
}


def check_engine_args(config: Any, *, on_gpu: bool) -> None:
    """Raises `ConfigError` for names that vLLM does not know, and values of another type than it wants."""
    rollout = getattr(config, "rollout", None)
    given: Mapping[str, Any] = getattr(rollout, "engine_args", None) or {}
    if problems := list(_problems(given, vllm_arguments(), on_gpu=on_gpu)):
        raise ConfigError(problems)


def _problems(given: Mapping[str, Any], known: Mapping[str, str], *, on_gpu: bool) -> Iterator[Problem]:
    for name, value in given.items():
        key = f"{KEY}.{name}"
        if not on_gpu and name in FIXED_ON_CPUS:
            yield Problem(key, f"{value} on CPUs", f"to be left out: {FIXED_ON_CPUS[name]}", f"remove {key}")
        if not known:  # this host has no vLLM: the engines will say
            continue
        if name not in known:
            close = get_close_matches(name, known, n=2)
            fix = f"did you mean {' or '.join(close)}?" if close else "see `vllm serve --help`"
            yield Problem(key, f"{value}", "an argument of vLLM's EngineArgs", fix)
        elif (wanted := _mismatch(value, known[name])) is not None:
            yield Problem(key, f"{value} ({type(value).__name__})", wanted, f"give {KEY}.{name} as {wanted}")


def _mismatch(value: Any, annotation: str) -> str | None:
    """What was wanted, for annotations of plain types like `int | None`; others are left to vLLM."""
    names = [name.strip() for name in annotation.split("|")]
    plain = [name for name in names if name in PLAIN]
    if not plain or set(names) - {*PLAIN, "None"} or (value is None and "None" in names):
        return None
    if isinstance(value, bool):
        fits = "bool" in plain
    elif isinstance(value, int):
        fits = "int" in plain or "float" in plain
    else:
        fits = isinstance(value, tuple(PLAIN[name] for name in plain))
    return None if fits else " or ".join(names)


@lru_cache
def vllm_arguments() -> dict[str, str]:
    """Annotation of each argument of the installed vLLM's `EngineArgs`; empty where vLLM is not installed."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "engine" / "arg_utils.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            fields = (each for each in node.body if isinstance(each, ast.AnnAssign))
            return {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields}
    raise LookupError(f"{source} has no class EngineArgs: rayrlhf was written for another vLLM")
