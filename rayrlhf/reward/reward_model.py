"""Inference of a reward model: any `AutoModelForSequenceClassification` checkpoint with one label.

`reward.reading` determines the tokens that it reads of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.config.reward import ModelSource
from rayrlhf.data.packing import micro_batches
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.hub.local import local_folder
from rayrlhf.models.heads import ScoreModel
from rayrlhf.models.load import has_packed_scorer, load_scorer, load_tokenizer, resolve_dtype
from rayrlhf.models.positions import positions_of
from rayrlhf.reward.items import Failure, ScoreItem
from rayrlhf.reward.reading import PromptFormat, Reading


class RewardModel:
    """If it has the policy's vocabulary, it reads the sample's tokens unchanged. Otherwise it renders the
    conversation with its own tokenizer and chat template, or as plain text if it has none. Decoders score
    packed batches; encoders, which have no causal mask to cut, score padded ones.
    """

    def __init__(self, source: ModelSource, prompt_format: PromptFormat | None) -> None:
        """Without `prompt_format` it reads the samples' token ids."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.source = source
        self.prompt_format = prompt_format
        self.tokenizer: Any = load_tokenizer(source.path)
        config = AutoConfig.from_pretrained(local_folder(source.path, weights=False)).to_dict()
        self.positions = positions_of(config)
        self.same_tokens = prompt_format is None
        if prompt_format is not None:
            policy: Any = load_tokenizer(
                prompt_format.tokenizer_path, trust_remote_code=prompt_format.trust_remote_code
            )
            self.same_tokens = self.tokenizer.get_vocab() == policy.get_vocab()
            self.reading = Reading.of(self.tokenizer, source.read_at, config)
        model_config = TrainedModelConfig(path=source.path, dtype=source.dtype, compile=source.compile)
        self.packed: ScoreModel | None = None
        if has_packed_scorer(source.path):
            self.packed = load_scorer(model_config, source.path, device=self.device).to(self.device)
        elif source.compile:
            raise ValueError(
                f"compile=true of the reward model {source.path}: encoders are not compiled; "
                "remove compile from its source in reward.sources"
            )
        else:
            dtype = resolve_dtype(source.dtype, self.device)
            model = AutoModelForSequenceClassification.from_pretrained(local_folder(source.path), dtype=dtype)
            self.padded: Any = model.eval().to(self.device)

    @torch.inference_mode()
    def score(self, items: list[ScoreItem]) -> list[float | Failure]:
        """Scores; a sample that it cannot read is a failure, without effect on the others."""
        token_ids = [self._read(item) for item in items]
        scores: list[float | Failure] = [ids if isinstance(ids, Failure) else 0.0 for ids in token_ids]
        readable = [(i, ids) for i, ids in enumerate(token_ids) if not isinstance(ids, Failure)]
        lengths = [len(ids) for _, ids in readable]
        budget = max([self.source.max_tokens_per_batch, *lengths])
        for members in micro_batches(lengths, budget):
            rows = [readable[m][1] for m in members]
            values = self._score_packed(rows) if self.packed is not None else self._score_padded(rows)
            for m, value in zip(members, values, strict=True):
                scores[readable[m][0]] = value
        return scores

    def _read(self, item: ScoreItem) -> list[int] | Failure:
        if self.prompt_format is None:
            return item.token_ids
        data = self.prompt_format.data
        try:
            if self.same_tokens:
                ids = self.reading.of_tokens(item.token_ids, is_chat=data.apply_chat_template)
            else:
                ids = self.reading.of_conversation(item.prompt.columns, data, item.response)
        except (BadRow, DataError) as error:
            return Failure(str(error), final=True)
        count, is_hard = self.positions
        if is_hard and count is not None and len(ids) > count:
            why = f"{len(ids)} tokens, and {self.source.path} has {count} positions"
            return Failure(why, final=True)
        return ids

    def _score_packed(self, rows: Sequence[list[int]]) -> list[float]:
        assert self.packed is not None
        lengths = [len(row) for row in rows]
        flat = torch.tensor([token for row in rows for token in row])
        inputs = (flat, position_ids_of(lengths), cu_seqlens_of(lengths))
        return self.packed(*(tensor.to(self.device) for tensor in inputs)).tolist()

    def _score_padded(self, rows: Sequence[list[int]]) -> list[float]:
        batch = self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(self.device)
        return self.padded(**batch).logits.squeeze(-1).float().tolist()
