"""Code of the user's that a config names: found on the driver, carried to where it runs."""

from __future__ import annotations

import importlib
import inspect
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Kind = Literal["function", "class"]


class UserCodeError(ValueError):
    """Code that cannot be found or imported; the message says what was looked for, and where."""


@dataclass(frozen=True)
class UserCode:
    """A function or class that can travel: a file is carried along as text, since other nodes may not have
    it.
    """

    text: str  # as in the config
    kind: Kind
    file_source: str | None  # the file's content, for path/file.py:name

    @property
    def place(self) -> str:
        return self.text.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.text.rpartition(":")[2]

    def load(self) -> Callable[..., Any]:
        """The function or class itself. Raises `UserCodeError` that says what was not found."""
        module = _import(self.place) if self.file_source is None else _run_file(self.place, self.file_source)
        found: Any = getattr(module, self.name, None)
        fits = inspect.isclass(found) if self.kind == "class" else callable(found)
        if not fits:
            others = _names(module, self.kind) or "none"
            raise UserCodeError(f"{self.place} has no {self.kind} {self.name!r}; it has: {others}")
        return found


def find_user_code(text: str, kind: Kind) -> UserCode:
    """Resolve `module:name` or `path/file.py:name` on the driver. Raises `UserCodeError`."""
    code = UserCode(text, kind, None)
    if not code.place or not code.name:
        raise UserCodeError(f"{text!r} is not of the form module:{kind} or path/file.py:{kind}")
    if code.place.endswith(".py"):
        path = Path(code.place)
        if not path.is_file():
            raise UserCodeError(f"{path} is not a file (looked from {Path.cwd()})")
        code = UserCode(text, kind, path.read_text(encoding="utf-8"))
    code.load()
    return code


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
    except Exception as error:
        raise UserCodeError(f"{name} fails at import: {type(error).__name__}: {error}") from error


def _run_file(path: str, source: str) -> ModuleType:
    # The checksum keeps apart files of one name in different folders.
    module = ModuleType(f"user_file_{Path(path).stem}_{zlib.crc32(source.encode()):08x}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise UserCodeError(f"{path} fails at import: {type(error).__name__}: {error}") from error
    return module
