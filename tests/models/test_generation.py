"""The generation config that an export writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rayrlhf.config.model import ModelConfig
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.generation import repair
from rayrlhf.runtime.model_checks import warn_invalid_generation_config
from rayrlhf.runtime.preflight import InputError
from tests.data.test_ends import CHATML, EOS, EXTRA
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model, make_tokenizer


def exported(folder: Path, template: str | None, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    path = Path(make_tiny_model(folder / "start"))
    if settings is not None:
        (path / "generation_config.json").write_text(json.dumps(settings))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    own = model.generation_config
    export_causal_lm(model, model.state_dict(), make_tokenizer(template), folder / "export")
    assert model.generation_config is own
    return json.loads((folder / "export" / "generation_config.json").read_text())


def test_17b_an_export_ends_where_its_template_does(tmp_path: Path) -> None:
    assert exported(tmp_path, CHATML)["eos_token_id"] == [EOS, EXTRA]


def test_17b_a_template_that_ends_with_eos_adds_nothing(tmp_path: Path) -> None:
    assert exported(tmp_path, CHAT_TEMPLATE)["eos_token_id"] == EOS


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95, "do_sample": True}),
        ({"temperature": 0.0, "eos_token_id": 2}, {"temperature": None}),
        ({"do_sample": False, "top_k": 20}, {"top_k": 20, "do_sample": True}),
    ],
)
def test_17c_an_invalid_generation_config_loses_no_training(
    settings: dict[str, Any], written: dict[str, Any], tmp_path: Path
) -> None:
    found = exported(tmp_path, None, settings)
    assert {name: found.get(name) for name in written} == written
    assert found["eos_token_id"] == EOS
    assert repair(GenerationConfig(**found))[1] == ""


def test_17c_it_is_reported_before_the_start(tmp_path: Path) -> None:
    path = Path(make_tiny_model(tmp_path))
    said: list[str] = []
    warn_invalid_generation_config(ModelConfig(path=str(path)), said.append)
    assert not said
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    warn_invalid_generation_config(ModelConfig(path=str(path)), said.append)
    [line] = said
    assert "is invalid, the export repairs it" in line and "temperature" in line
    for broken in ("{", json.dumps({"num_beams": 2, "num_return_sequences": 4})):  # no model loads with it
        (path / "generation_config.json").write_text(broken)
        with pytest.raises(InputError, match=r"generation_config.json cannot be read: .*repair the file"):
            warn_invalid_generation_config(ModelConfig(path=str(path)), said.append)
