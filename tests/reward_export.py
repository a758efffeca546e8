"""A reward model as our training leaves it, and its scores by plain transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayrlhf.config.model import ModelConfig
from rayrlhf.models.export import export_reward_model
from rayrlhf.models.load import load_reward_model, load_tokenizer
from tests.tiny_model import make_tiny_model

MEAN, STD = 0.25, 2.0
TEXTS = [
    "<s><|user|>What is 2 + 3?</s><|assistant|>It is five.</s>",
    "<s><|user|>Hi</s><|assistant|>",
    "<s><|system|>Be brief.</s><|user|>Why is the sky blue, and not green?</s><|assistant|>Rayleigh, grüße",
    "<s>x",
]


def make_reward_export(folder: Path, **reading: str) -> str:
    source = make_tiny_model(folder / "source", sequence_classification=True)
    model = load_reward_model(ModelConfig(path=source), source, device=torch.device("cpu"))
    export = folder / "export"
    tokenizer = load_tokenizer(source)
    export_reward_model(model, model.state_dict(), tokenizer, export, mean=MEAN, std=STD, reading=reading)
    return str(export)


@torch.no_grad()
def plain_scores(path: str, texts: list[str]) -> list[float]:
    """As OpenRLHF reads a reward model: one batch padded on the left, the score at the last position."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return model.score(hidden)[:, -1].squeeze(-1).tolist()
