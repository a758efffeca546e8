"""Chains on a tiny model whose reward is the share of vowels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rayrlhf.config.chains import ConditionalSftConfig, IterativeDpoConfig, RejectionSamplingConfig
from rayrlhf.data.rows.prompt_rows import prompt_columns
from rayrlhf.data.store import ExampleStore
from rayrlhf.inference import rounds as chain
from rayrlhf.inference.rounds import run_chain
from rayrlhf.inference.select import best_and_worst, best_of_n, labelled
from tests.integration.answer_runs import VOWELS, lines_of, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def tiny_chain(folder: Path, model_path: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": "chain", "dir": str(folder / "runs")},
        "model": {"path": model_path},
        "data": {"train": str(write_rows(folder / "rows.jsonl", 32)), "max_prompt_tokens": 64},
        "rollout": {
            "group_size": 8,
            "kv_cache_bytes": 64 * 2**20,
            "sampling": {"max_new_tokens": 12},
            "num_threads": 1,
        },
        "generate": {"rows_per_shard": 16},
        "reward": {"sources": [VOWELS]},
        "placement": {"preset": "colocate_all", "cpus_per_slot": 0.5},
        "observe": {"console": "lines", "tensorboard": False},
        **changes,
    }


TRAIN = {
    "num_epochs": 4,
    "samples_per_step": 8,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_tokens_per_micro_batch": 1024,
    "num_threads": 1,
}


def model_of(folder: Path) -> str:
    return json.loads((folder / "generate.json").read_text())["model"]["path"]


@pytest.mark.long  # two rounds, stopped in between: five starts of Ray Serve or Train
def test_iterative_dpo(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo = {"data": {"max_tokens": 64}, "train": {**TRAIN, "lr": 3e-4}}
    config = IterativeDpoConfig.model_validate(tiny_chain(tmp_path, tiny_model, num_rounds=2, dpo=dpo))

    def choose(rows: Any) -> Any:
        return best_and_worst(rows, prompt_columns(config.data), config.choose)

    with monkeypatch.context() as patched:  # stopped when the second round begins
        run_generate = chain.run_generate
        patched.setattr(chain, "run_generate", lambda c: 143 if c.run.name[0] == "2" else run_generate(c))
        assert run_chain(config, choose) == 143
    capsys.readouterr()
    assert run_chain(config, choose) == 0
    assert "stage 3 of 7, 1-dpo: already done" in capsys.readouterr().out

    run_path = tmp_path / "runs/chain"
    export = str(run_path / "1-dpo/export")
    assert model_of(run_path / "2-generate") == export
    assert model_of(run_path / "3-generate") == str(run_path / "2-dpo/export")
    pairs = lines_of(run_path / "1-choose/chosen.jsonl")
    assert pairs and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    asked = {row["row_id"]: row for row in lines_of(run_path / "1-generate/generations.jsonl")}
    for pair in pairs:
        assert {pair["chosen"], pair["rejected"]} <= set(asked[pair["row_id"]]["responses"])
    resolved = (run_path / "2-dpo/config.yaml").read_text()
    assert resolved.count(f"path: {export}\n") == 2, "the model and its reference"

    summary = json.loads((run_path / "summary.json").read_text())
    assert [entry["counts"]["pairs"] > 0 for entry in summary["rounds"]] == [True, True]
    assert Path(summary["export"], "config.json").is_file()
    # 256 responses each: the intervals are well separated when it learns, and overlap when it does not.
    assert summary["last"]["score_ci"][0] > summary["rounds"][0]["score_ci"][1]


@pytest.mark.long
def test_rejection_sampling(tmp_path: Path, tiny_model: str) -> None:
    sft = {"data": {"max_tokens": 64}, "train": {**TRAIN, "lr": 2e-3}}
    config = RejectionSamplingConfig.model_validate(tiny_chain(tmp_path, tiny_model, sft=sft))
    assert run_chain(config, lambda rows: best_of_n(rows, prompt_columns(config.data), config.choose)) == 0

    run_path = tmp_path / "runs/chain"
    asked = lines_of(run_path / "1-generate/generations.jsonl")
    chosen = lines_of(run_path / "1-choose/chosen.jsonl")
    best = {row["row_id"]: max(row["scores"]) for row in asked}
    assert {row["row_id"]: row["score"] for row in chosen} == best
    assert model_of(run_path / "2-generate") == str(run_path / "1-sft/export")
    summary = json.loads((run_path / "summary.json").read_text())
    assert summary["rounds"][0]["counts"]["chosen"] == 32
    assert summary["last"]["score_ci"][0] > summary["rounds"][0]["score_ci"][1]


@pytest.mark.long
def test_conditional_sft_on_responses_that_are_given(tmp_path: Path, tiny_model: str) -> None:
    rows = [{"prompt": f"say {i}", "answer": "ab" if i % 2 else "aaaa"} for i in range(16)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_chain(
        tmp_path,
        tiny_model,
        data={"train": str(tmp_path / "given.jsonl"), "response_key": "answer", "max_prompt_tokens": 64},
        rollout={},
        sft={"data": {"max_tokens": 64}, "train": TRAIN, "reward_template": "<{}>"},
    )
    config = ConditionalSftConfig.model_validate(tree)
    assert run_chain(config, lambda rows: labelled(rows, prompt_columns(config.data), config.choose)) == 0

    run_path = tmp_path / "runs/chain"
    chosen = lines_of(run_path / "1-choose/chosen.jsonl")
    assert [(row["response"], row["reward"]) for row in chosen] == [("aaaa", 1.0), ("ab", 0.5)] * 8
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    stored = ExampleStore.open(run_path / "1-sft/data/train.arrow")
    texts = {tokenizer.decode(example.sequences[0].input_ids) for example in stored}
    assert "<s><|user|><1>say 0</s><|assistant|>aaaa</s>" in texts
    assert "<s><|user|><0.5>say 1</s><|assistant|>ab</s>" in texts
    summary = json.loads((run_path / "summary.json").read_text())
    assert summary["rounds"][0]["score_mean"] == pytest.approx(0.75)
    assert summary["last"] is None and Path(summary["export"], "config.json").is_file()
