"""Commands that load a model by themselves take ids too."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from rayrlhf.capacity.model_shape import ShapeUnknown, read_shape
from rayrlhf.commands.chat.main import main as chat
from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import TrainedAdapter, adapter_weights
from tests.hub.test_resolve import pinned
from tests.local_hub import LocalHub


@pytest.fixture
def adapter(hub: LocalHub, policy: Path, tmp_path: Path) -> str:
    """An adapter of the policy's, as our training writes it, on the hub."""
    from transformers import AutoModelForCausalLM

    from rayrlhf.models.lora import add_adapters, write_adapter

    model, lora = AutoModelForCausalLM.from_pretrained(policy), LoraConfig(rank=2)
    add_adapters(model, lora, seed=0)
    state = {name: torch.full_like(weight, 0.1) for name, weight in adapter_weights(model)}
    trained = TrainedAdapter(lora, pinned("tiny/policy"), state)
    write_adapter(tmp_path / "adapter", trained, task="CAUSAL_LM")
    hub.add("tiny/adapter", tmp_path / "adapter")
    return "tiny/adapter"


def test_a_plan_reads_the_cache_alone(hub: LocalHub) -> None:
    with pytest.raises(ShapeUnknown, match="tiny/policy: no config"):
        read_shape("tiny/policy")
    assert hub.asked == []
    ref = pinned("tiny/policy")
    asked = len(hub.asked)
    assert read_shape("tiny/policy").hidden == read_shape(ref).hidden == 128
    with pytest.raises(ShapeUnknown):
        read_shape("tiny/policy@" + "0" * 40)
    assert len(hub.asked) == asked


def test_an_adapter_names_its_base_and_the_commit(hub: LocalHub, adapter: str, tmp_path: Path) -> None:
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "tiny/policy"
    assert written["revision"] == hub.repos["model", "tiny/policy"].refs["main"]


def test_chat_and_merge_fetch_an_adapter_with_its_base(
    hub: LocalHub,
    adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert chat([adapter, "--max-new-tokens", "2"]) == 0
    stderr = capsys.readouterr().err
    assert "fetched tiny/adapter: " in stderr and "fetched tiny/policy: 1.3 MB" in stderr
    assert merge_lora([adapter, str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert hub.downloads()["tiny/policy/model.safetensors"] == 1

    assert chat(["tiny/none"]) == merge_lora(["tiny/none", str(tmp_path / "other")]) == 2
    for line in capsys.readouterr().err.splitlines():
        if line.startswith("error"):
            assert "has none of that name" in line
