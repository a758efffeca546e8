"""A served reward model gives the scores of plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config.serve_reward import ServedModel, ServedRewardConfig, ServeRewardConfig
from rayrlhf.models.load import load_tokenizer
from rayrlhf.reward.model_deployment import ScoreActor
from rayrlhf.reward_server.requests import TextTokens, token_item
from rayrlhf.reward_server.source_checks import check_sources
from tests.reward_export import TEXTS, make_reward_export, plain_scores


@pytest.mark.parametrize("max_tokens_per_batch", [8192, 40])
def test_packed_scores_are_those_of_left_padded_batches(tmp_path: Path, max_tokens_per_batch: int) -> None:
    export = make_reward_export(tmp_path)
    source = ServedModel(type="model", path=export, max_tokens_per_batch=max_tokens_per_batch)
    [served] = check_sources(ServeRewardConfig(reward=ServedRewardConfig(sources=[source])))
    assert served.facts is not None
    rows = TextTokens(source, load_tokenizer(export), served.facts).of(TEXTS)
    scores = ScoreActor(source, None).score([token_item(ids) for ids in rows])
    expected = plain_scores(export, TEXTS)
    assert max(expected) - min(expected) > 0.1, "scores that are all alike would prove nothing"
    assert scores == pytest.approx(expected, abs=1e-5)
