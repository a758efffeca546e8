"""What is exported is readable by those whom the umask lets, although safetensors makes its files 0600."""

from __future__ import annotations

import ast
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.commands.render.targets import main as render
from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import TrainedAdapter, adapter_weights
from rayrlhf.models.export import export_causal_lm, export_reward_model, export_step_model
from rayrlhf.models.heads import ScoreModel, StepModel
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.modes import honour_umask
from tests.modes import umask, unlike
from tests.tiny_model import make_tokenizer

MASKS = [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o007, 0o660, 0o770)]
LORA = LoraConfig(rank=4)
REPOSITORY = Path(__file__).resolve().parents[2]
# Who lets safetensors or tempfile make what others read. These call `honour_umask`, but for:
MAKERS = {
    "rayrlhf/models/export.py": "",
    "rayrlhf/models/merge.py": "",
    "rayrlhf/train/trained_weights.py": "",
    "jobs/demo/model.py": "",
    "rayrlhf/models/lora.py": "writes into the folder of export.py",
    "rayrlhf/data/sources/remote.py": "a cache in the user's own folder",
}


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), MASKS)
def test_private_files_and_folders_get_the_modes_of_others(
    mask: int, file_mode: int, folder_mode: int, tmp_path: Path
) -> None:
    with umask(mask):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        inner = Path(tempfile.mkdtemp(dir=folder))
        save_file({"a": torch.zeros(2)}, inner / "a.safetensors")
        script = inner / "run.sh"
        script.touch()
        script.chmod(0o700)
        assert mode_of(folder) == 0o700 and mode_of(inner / "a.safetensors") == 0o600, "why it is needed"
        honour_umask(folder)
        assert sorted(path.name for path in folder.rglob("*")) == sorted(
            [inner.name, "a.safetensors", "run.sh"]
        )
    assert mode_of(folder) == mode_of(inner) == folder_mode
    assert mode_of(inner / "a.safetensors") == file_mode
    assert mode_of(script) == file_mode | {0o644: 0o111, 0o600: 0o100, 0o660: 0o110}[file_mode]


def test_a_folder_that_hands_down_its_group_still_does(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with umask(0o022):
        folder = tmp_path / "export"
        folder.mkdir(0o700)
        honour_umask(folder)
    assert mode_of(folder) == 0o2755


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(0o600)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    with umask(0o022):
        honour_umask(folder)
    assert mode_of(elsewhere) == 0o600


def test_a_mount_that_changes_no_modes_costs_a_warning_and_not_the_export(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of SMB, FUSE, or NFS with another owner."""

    def refused(*_arguments: object, **_options: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    with umask(0o022):
        export_causal_lm(causal_lm, causal_lm.state_dict(), make_tokenizer(), tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").is_file()
    assert "keeps mode 600 (Operation not permitted)" in caplog.text


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), MASKS)
@pytest.mark.parametrize("kind", ["policy", "reward", "steps"])
def test_exports_adapters_and_merged_models_honour_the_umask(
    kind: str, mask: int, file_mode: int, folder_mode: int, tiny_model: str, tmp_path: Path
) -> None:
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base = causal_lm if kind == "policy" else causal_lm.base_model
    add_adapters(base, LORA, seed=0)
    width = base.config.hidden_size
    model: Any = {
        "policy": lambda: base,
        "reward": lambda: ScoreModel(base, nn.Linear(width, 1, bias=False)),
        "steps": lambda: StepModel(base, nn.Linear(width, 2)),
    }[kind]()
    adapter = TrainedAdapter(LORA, tiny_model, {name: p.detach() for name, p in adapter_weights(model)})
    state = {
        name.replace(".base_layer", ""): tensor.detach()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    export, merged = tmp_path / "export", tmp_path / "merged"
    with umask(mask):
        if kind == "policy":
            export_causal_lm(model, state, make_tokenizer(), export, adapter=adapter)
        elif kind == "reward":
            export_reward_model(model, state, make_tokenizer(), export, adapter=adapter)
        else:
            export_step_model(model, state, make_tokenizer(), export, step_token="</s>", adapter=adapter)
        assert merge_lora([str(export / "adapter"), str(merged)]) == 0
    assert (export / "model.safetensors").is_file() and (
        export / "adapter/adapter_model.safetensors"
    ).is_file()
    assert (merged / "model.safetensors").is_file()
    assert unlike(export, file_mode, folder_mode) == unlike(merged, file_mode, folder_mode) == []


@pytest.mark.parametrize(("mask", "script_mode"), [(0o022, 0o755), (0o077, 0o700), (0o027, 0o750)])
def test_a_rendered_script_runs_for_those_who_may_read_it(
    mask: int, script_mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "run.sh"
    with umask(mask):
        assert render(["--target", "slurm", "jobs/configs/ppo-8x-gpu.yaml", "--out", str(out)]) == 0
    assert mode_of(out) == script_mode


def test_whatever_lets_others_make_private_files_is_known_here() -> None:
    """A new one must call `honour_umask`, or say above why it need not."""
    found = set()
    for file in [*REPOSITORY.glob("rayrlhf/**/*.py"), *REPOSITORY.glob("jobs/**/*.py")]:
        text = file.read_text()
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
        }
        if called & {
            "save_file",
            "save_pretrained",
            "save_model",
            "mkdtemp",
            "mkstemp",
            "NamedTemporaryFile",
        }:
            name = os.fspath(file.relative_to(REPOSITORY))
            found.add(name)
            assert MAKERS.get(name) or "honour_umask" in called, name
    assert found == set(MAKERS)
