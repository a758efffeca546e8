"""User code named in a config: located on the driver, sent as source text to the processes that run it."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from rayrlhf.isolation.frames import described

Kind = Literal["function", "class"]
OWN_FILES = (__file__, importlib.__file__)  # frames to skip in tracebacks of user code


class UserCodeError(ValueError):
    """User code that cannot be found or imported; the message names the code and the searched path."""


@dataclass(frozen=True)
class CarriedModule:
    """A module next to the user's file, or within a package there."""

    module: str  # dotted name
    path: str  # on the driver
    text: str
    is_package: bool


@dataclass(frozen=True)
class UserCode:
    """A function or class that can be sent to other nodes: its file is included as text, with the modules
    next to it that it imports, since other nodes may not have them.
    """

    text: str  # as written in the config
    kind: Kind
    file_source: str | None = None  # content of the file, for path/file.py:name
    folder: str = ""  # folder of the file, on the driver
    carried_modules: tuple[CarriedModule, ...] = ()

    @property
    def place(self) -> str:
        return self.text.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.text.rpartition(":")[2]

    def load(self) -> Callable[..., Any]:
        """Import and return the function or class. Raises `UserCodeError` that says what was not found.

        It runs user code and changes the import path of this process: call it in a separate process
        (`rayrlhf.isolation`).
        """
        module = _import(self.place) if self.file_source is None else self._run_file(self.file_source)
        found: Any = getattr(module, self.name, None)
        fits = inspect.isclass(found) if self.kind == "class" else callable(found)
        if not fits:
            others = _names(module, self.kind) or "none"
            raise UserCodeError(f"{self.place} has no {self.kind} {self.name!r}; it has: {others}")
        return found

    def _run_file(self, source: str) -> ModuleType:
        """Like `python file.py`: modules of its folder come first."""
        sys.path.insert(0, self.folder)  # for modules that are not carried, if the folder exists here
        sys.meta_path.insert(0, _CarriedImporter(self.carried_modules))
        path = str(Path(self.folder) / Path(self.place).name)
        # The checksum distinguishes files of the same name in different folders.
        module = ModuleType(f"user_file_{Path(path).stem}_{zlib.crc32(source.encode()):08x}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # dataclasses and others look up their module
        try:
            exec(compile(source, path, "exec"), module.__dict__)
        except BaseException as error:  # includes exit() at import
            raise UserCodeError(f"{self.place} fails at import: {described(error, OWN_FILES)}") from error
        return module


def find_user_code(text: str, kind: Kind) -> UserCode:
    """Resolve `module:name` or `path/file.py:name` on the driver, without running any of it. Raises
    `UserCodeError`.
    """
    code = UserCode(text, kind)
    if not code.place or not code.name:
        raise UserCodeError(f"{text!r} is not of the form module:{kind} or path/file.py:{kind}")
    if not code.place.endswith(".py"):
        return code
    path = Path(code.place)
    if not path.is_file():
        raise UserCodeError(f"{path} is not a file (looked from {Path.cwd()})")
    folder = path.resolve().parent
    try:
        source = path.read_text(encoding="utf-8")
        return UserCode(text, kind, source, str(folder), _local_imports(source, folder))
    except (OSError, UnicodeDecodeError) as error:
        raise UserCodeError(f"{path} cannot be read: {error}") from error


def _local_imports(source: str, folder: Path) -> tuple[CarriedModule, ...]:
    """The modules and packages in `folder` that a file there imports, at module level or within functions,
    and those that they import themselves.
    """
    found: dict[str, CarriedModule] = {}
    remaining = [source]
    while remaining:
        for name in _imported_names(remaining.pop()):
            package, single = folder / name, folder / f"{name}.py"
            is_package = (package / "__init__.py").is_file()
            if name in found or not (is_package or single.is_file()):
                continue
            for path in sorted(package.rglob("*.py")) if is_package else [single]:
                parts = path.relative_to(folder).with_suffix("").parts
                is_init = parts[-1] == "__init__"
                module = ".".join(parts[:-1] if is_init else parts)
                text = path.read_text(encoding="utf-8")
                found[module] = CarriedModule(module, str(path), text, is_init)
                remaining.append(text)
    return tuple(found.values())


def _imported_names(source: str) -> set[str]:
    """Top-level names of absolute imports. A file that cannot be parsed will fail when it is imported."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


class _CarriedImporter(MetaPathFinder, InspectLoader):
    """Imports modules from the carried source texts."""

    def __init__(self, carried_modules: Sequence[CarriedModule]) -> None:
        self.modules = {each.module: each for each in carried_modules}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        found = self.modules.get(fullname)
        if found is None:
            return None
        spec = spec_from_loader(fullname, self, origin=found.path, is_package=found.is_package)
        assert spec is not None
        spec.has_location = True
        if found.is_package:
            spec.submodule_search_locations = [str(Path(found.path).parent)]
        return spec

    def get_source(self, fullname: str) -> str:
        return self.modules[fullname].text

    def is_package(self, fullname: str) -> bool:
        return self.modules[fullname].is_package

    def get_code(self, fullname: str) -> CodeType:
        found = self.modules[fullname]
        return self.source_to_code(found.text, found.path)


def _names(module: ModuleType, kind: Kind) -> str:
    is_kind = inspect.isclass if kind == "class" else inspect.isfunction
    public = {name: found for name, found in vars(module).items() if is_kind(found) and name[0] != "_"}
    return ", ".join(sorted(name for name, found in public.items() if found.__module__ == module.__name__))


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserCodeError(
            f"cannot import {name!r} ({error}); is it on PYTHONPATH, or did you mean a .py file?"
        ) from error
    except BaseException as error:
        raise UserCodeError(f"{name} fails at import: {described(error, OWN_FILES)}") from error


def log_of(run_path: str | Path, name: str) -> Path:
    """Log file for the output of user code: in the run's folder, which all nodes share."""
    return Path(run_path) / "logs" / f"{name}.log"
