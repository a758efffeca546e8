"""A reward model at work: any `AutoModelForSequenceClassification` checkpoint with one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.reward import ModelSource
from rayrlhf.data.chat import as_text
from rayrlhf.data.markers import encode
from rayrlhf.data.packing import micro_batches
from rayrlhf.data.prompt_rows import Question, prompt_of
from rayrlhf.data.template import apply_template
from rayrlhf.hub.local import local_folder
from rayrlhf.models.heads import ScoreModel
from rayrlhf.models.load import has_packed_scorer, load_scorer, load_tokenizer, resolve_dtype
from rayrlhf.reward.items import ScoreItem
from rayrlhf.samples import Prompt


class RewardModel:
    """With the policy's own vocabulary it reads the very tokens of the sample. Otherwise it renders the
    conversation with its own tokenizer and chat template. Decoders score packed batches; encoders, which have
    no causal mask to cut, score padded ones.
    """

    def __init__(self, source: ModelSource, policy_path: str, data: PromptDataConfig | None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.source = source
        self.data = data  # how the policy's rows are read; None where only tokens are scored
        self.tokenizer: Any = load_tokenizer(source.path)
        self.same_tokens = self.tokenizer.get_vocab() == load_tokenizer(policy_path).get_vocab()
        model_config = ModelConfig(path=source.path, dtype=source.dtype)
        self.packed: ScoreModel | None = None
        if has_packed_scorer(source.path):
            self.packed = load_scorer(model_config, source.path, device=self.device).to(self.device)
        else:
            dtype = resolve_dtype(source.dtype, self.device)
            model = AutoModelForSequenceClassification.from_pretrained(local_folder(source.path), dtype=dtype)
            self.padded: Any = model.eval().to(self.device)

    @torch.inference_mode()
    def score(self, items: list[ScoreItem]) -> list[float]:
        if self.same_tokens:
            token_ids = [item.token_ids for item in items]
        else:
            token_ids = [self._tokenise(item.prompt, item.response) for item in items]
        scores = [0.0] * len(token_ids)
        lengths = [len(ids) for ids in token_ids]
        budget = max(self.source.max_tokens_per_batch, *lengths)
        for members in micro_batches(lengths, budget):
            rows = [token_ids[i] for i in members]
            values = self._score_packed(rows) if self.packed is not None else self._score_padded(rows)
            for i, value in zip(members, values, strict=True):
                scores[i] = value
        return scores

    def _tokenise(self, prompt: Prompt, response: str) -> list[int]:
        has_row = self.data is not None and self.data.prompt_key in prompt.columns
        if self.tokenizer.chat_template is None:
            asked = prompt.columns[self.data.prompt_key] if self.data and has_row else prompt.prompt
            return self.tokenizer(f"{asked}{response}")["input_ids"]
        asked = prompt_of(prompt.columns, self.data) if self.data and has_row else prompt.prompt
        question = asked if isinstance(asked, Question) else Question([{"role": "user", "content": asked}])
        answer = {"role": "assistant", "content": response}
        messages, tools, _ = as_text([*question.messages, answer], question.tools, self.tokenizer)
        text = apply_template(messages, self.tokenizer, tools=tools, add_generation_prompt=False)
        return encode(text, self.tokenizer)

    def _score_packed(self, rows: Sequence[list[int]]) -> list[float]:
        assert self.packed is not None
        lengths = [len(row) for row in rows]
        flat = torch.tensor([token for row in rows for token in row])
        inputs = (flat, position_ids_of(lengths), cu_seqlens_of(lengths))
        return self.packed(*(tensor.to(self.device) for tensor in inputs)).tolist()

    def _score_padded(self, rows: Sequence[list[int]]) -> list[float]:
        batch = self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(self.device)
        return self.padded(**batch).logits.squeeze(-1).float().tolist()
