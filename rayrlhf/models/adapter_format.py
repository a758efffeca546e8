"""File format of PEFT adapters, and checks of a merge without loading a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.hub.ids import parse_id
from rayrlhf.hub.resolve import base_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # prefix of the base's parameter names in it
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")


class MergeProblem(ValueError):
    """A merge that is not possible; the message says what was wanted and the fix."""


@dataclass(frozen=True)
class Plan:
    adapter: Path
    out: Path
    base: str  # folder or hub id, from the adapter's config or the command line
    task: str  # one of TASKS
    base_folder: str = ""  # local folder of a hub id; empty: `base` is a folder

    @property
    def loaded_base(self) -> str:
        return self.base_folder or self.base


def make_plan(adapter: str, out: str, base: str | None) -> Plan:
    """Check what is possible without a model. Raises `MergeProblem`."""
    folder, target = Path(adapter), Path(out)
    if not (folder / ADAPTER_CONFIG).is_file():
        found = "no such folder" if not folder.is_dir() else f"the folder has no {ADAPTER_CONFIG}"
        whole = " (it is a whole checkpoint already)" if (folder / "config.json").is_file() else ""
        raise MergeProblem(f"ADAPTER={adapter}: {found}{whole}; wanted the folder of a PEFT adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MergeProblem(f"ADAPTER={adapter}: the folder has no {ADAPTER_WEIGHTS}; save the adapter again")
    if target.exists():
        raise MergeProblem(f"OUT={out} exists; give another folder, or remove it")
    config = _read_json(folder / ADAPTER_CONFIG)
    task = config.get("task_type")
    if task not in TASKS:
        raise MergeProblem(
            f"ADAPTER={adapter}: task_type={task} in {ADAPTER_CONFIG}; wanted one of {', '.join(TASKS)}"
        )
    base = base or base_of(folder)
    if not base:
        raise MergeProblem(f"ADAPTER={adapter}: {ADAPTER_CONFIG} names no base; give --base")
    check_base(base)
    return Plan(folder, target, base, task)


def check_base(base: str) -> None:
    """A folder must hold an unquantized checkpoint; anything else must be a valid hub id."""
    folder = Path(base)
    if not folder.is_dir():
        if isinstance(reason := parse_id(base), str):
            raise MergeProblem(
                f"the base {base} is no folder (looked from {Path.cwd()}), and not a hub id, because "
                f"{reason}; give the one the adapter was trained on with --base"
            )
        return
    if not (folder / "config.json").is_file():
        raise MergeProblem(f"the base {base} has no config.json; wanted a Hugging Face checkpoint folder")
    if "quantization_config" in _read_json(folder / "config.json"):
        raise MergeProblem(
            f"the base {base} is quantized, and merging would round the trained update to its few levels; "
            "give the checkpoint that it was quantized from with --base"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeProblem(f"{path} cannot be read: {error}") from error
