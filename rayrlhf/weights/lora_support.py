"""Whether the installed vLLM can add LoRA adapters to an architecture, read from its source.

Importing vLLM takes seconds, and only engines do it: this parses its registry of models, the bases of the
model's class, and the names in its files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

ENTRY = r'"{}":\s*\(\s*"([\w.]+)",\s*"(\w+)"'  # of the registry: architecture -> (module, class)
PACKAGE = "vllm.model_executor.models."
INTERFACE = "SupportsLoRA"


def why_unsupported(architecture: str, modules: Collection[str]) -> str | None:
    """Why vLLM cannot adapt these modules of this architecture; None if it can.

    Args:
        architecture: as in config.json, e.g. LlamaForCausalLM.
        modules: last names of the adapted layers, e.g. q_proj.
    """
    folder = _models_folder()
    if folder is None:
        return "vLLM is not installed here"
    entry = re.search(ENTRY.format(re.escape(architecture)), (folder / "registry.py").read_text("utf-8"))
    if entry is None:
        return f"vLLM has no model of its own for {architecture}"
    module, name = entry.groups()
    if module == "transformers":
        return f"vLLM runs {architecture} with transformers' code, whose layers have other names"
    if not _implements(folder, module, name, set()):
        return f"vLLM's {name} takes no LoRA adapters"
    text = "".join(_file(folder, each).read_text("utf-8") for each in _imported(folder, module))
    missing = [each for each in modules if not re.search(rf'(self\.{each}\b|"{each}")', text)]
    return f"vLLM's {name} has no layer {', '.join(sorted(missing))}" if missing else None


@lru_cache
def _models_folder() -> Path | None:
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0], "model_executor", "models")
    return folder if (folder / "registry.py").is_file() else None


def _implements(folder: Path, module: str, name: str, seen: set[tuple[str, str]]) -> bool:
    """Whether a class derives from `INTERFACE`, through classes of the models' package."""
    if name == INTERFACE:
        return True
    if (module, name) in seen or not _file(folder, module).is_file():
        return False
    seen.add((module, name))
    tree = _tree(_file(folder, module))
    sources = dict(_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return any(_implements(folder, *sources.get(base, (module, base)), seen) for base in bases)
    source = sources.get(name)
    return source is not None and _implements(folder, *source, seen)


def _imported(folder: Path, module: str) -> set[str]:
    """The module and the models' modules that it imports, directly or not."""
    found: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        if current in found or not _file(folder, current).is_file():
            continue
        found.add(current)
        pending += [source for _, (source, _) in _imports(_tree(_file(folder, current)))]
    return found


def _imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """(local name, (module, name)) of what a file imports from the models' package."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.level == 1 or node.module.startswith(PACKAGE):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module.removeprefix(PACKAGE), alias.name)


def _file(folder: Path, module: str) -> Path:
    return folder.joinpath(*module.split(".")).with_suffix(".py")


@lru_cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))
