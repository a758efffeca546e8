"""Every supervised job learns on a tiny model, and plain transformers opens what it exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rayrlhf.supervised.driver import run_supervised
from tests.integration import supervised_data as made
from tests.integration.supervised_runs import job
from tests.modes import umask, unreadable

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

OPENED_BY = {
    **dict.fromkeys(("sft", "dpo", "kto", "kd"), "AutoModelForCausalLM"),
    "rm": "AutoModelForSequenceClassification",
    "prm": "AutoModelForTokenClassification",
}


def run(config: Any) -> dict[str, Any]:
    """Run to the end; the summary. Others can read what it leaves."""
    with umask(0o022):
        assert run_supervised(config) == 0
    assert unreadable(Path(config.run.path)) == []
    summary = json.loads((Path(config.run.path) / "summary.json").read_text())
    metrics = {key.removeprefix("eval/") for key in summary["evaluation"]["after"]}
    assert metrics >= set(config.eval_metrics)  # whatever eval.metric may be set to is measured
    getattr(transformers, OPENED_BY[config.job]).from_pretrained(summary["export"])
    assert transformers.AutoTokenizer.from_pretrained(summary["export"]).chat_template
    return summary


def logged(config: Any, key: str) -> list[float]:
    lines = (Path(config.run.path) / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_sft_learns_and_exports(tmp_path: Path, tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made.write(tmp_path / "train.jsonl", made.conversations(128))
    made.write(tmp_path / "eval.jsonl", made.conversations(32, seed=1))
    config = job(tmp_path, tiny_model, "sft", train={"num_steps": 30}, eval={"every_steps": 10})
    summary = run(config)
    before, after = (summary["evaluation"][when]["eval/loss"] for when in ("before", "after"))
    assert after < 0.5 * before
    assert summary["best"]["loss"] == pytest.approx(min(logged(config, "eval/loss")[1:]))
    assert (Path(config.run.path) / "best" / "config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(summary["export"])
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    messages = [{"role": "user", "content": "say k"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.size(1) :])
    assert answer == "kkk"


def test_rm_ranks_held_out_pairs(tmp_path: Path, tiny_model: str) -> None:
    made.write(tmp_path / "train.jsonl", made.pairs(256))
    made.write(tmp_path / "eval.jsonl", made.pairs(64, seed=1))
    config = job(tmp_path, tiny_model, "rm")
    summary = run(config)
    assert summary["evaluation"]["after"]["eval/accuracy"] > 0.9
    exported = json.loads((Path(summary["export"]) / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    assert exported["std"] > 0


@pytest.mark.long
def test_prm_finds_planted_wrong_steps(tmp_path: Path, tiny_model: str) -> None:
    from transformers import AutoModelForTokenClassification

    made.write(tmp_path / "train.jsonl", made.solutions(256))
    made.write(tmp_path / "eval.jsonl", made.solutions(64, seed=1))
    changes = {"data": {"step_token": made.STEP_TOKEN}, "train": {"num_steps": 20}}
    summary = run(job(tmp_path, tiny_model, "prm", **changes))
    after = summary["evaluation"]["after"]
    assert after["eval/accuracy_bad"] > 0.9 and after["eval/accuracy_good"] > 0.9
    model: Any = AutoModelForTokenClassification.from_pretrained(summary["export"])
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.step_token == made.STEP_TOKEN


@pytest.mark.long
def test_dpo_raises_the_margin_whether_the_reference_is_asked_or_kept(
    tmp_path: Path, tiny_model: str
) -> None:
    """Two ways to the same: in one go on one worker, and in two halves on two, which share the model (ZeRO-3)
    and keep the reference's answers on disk.

    The kin of DPO differ in the loss alone, which test_supervised_parity runs for each.
    """
    made.write(tmp_path / "train.jsonl", made.pairs(128))
    made.write(tmp_path / "eval.jsonl", made.pairs(32, seed=1))

    def dpo(name: str, steps: int, precompute: bool) -> Any:
        workers, stage = (2, 3) if precompute else (1, 2)
        train = {"num_steps": steps, "lr": 1e-3, "num_workers": workers, "zero_stage": stage}
        return job(
            tmp_path, tiny_model, "dpo", run={"name": name}, ref={"precompute": precompute}, train=train
        )

    whole = dpo("whole", 6, False)
    before, after = (run(whole)["evaluation"][when] for when in ("before", "after"))
    assert after["eval/margin"] > before["eval/margin"] + 0.1
    assert after["eval/loss"] < before["eval/loss"]
    assert after["eval/accuracy"] > 0.9
    run(dpo("kept", 3, True))
    kept = dpo("kept", 6, True)
    run(kept)
    assert logged(kept, "loss/model") == pytest.approx(logged(whole, "loss/model"), rel=1e-5)
    assert logged(kept, "eval/loss")[-1] == pytest.approx(logged(whole, "eval/loss")[-1], rel=1e-5)
    # One table per split and per number of steps, which ask about different rows of the training data.
    assert len(list((tmp_path / "runs/kept/data").glob("ref-*.npy"))) == 3


@pytest.mark.long
def test_kto_raises_the_margin(tmp_path: Path, tiny_model: str) -> None:
    made.write(tmp_path / "train.jsonl", made.judged(128))
    made.write(tmp_path / "eval.jsonl", made.judged(32, seed=1))
    changes = {"algorithm": {"desirable_weight": 2.0}, "train": {"num_steps": 8, "lr": 1e-3}}
    summary = run(job(tmp_path, tiny_model, "kto", **changes))
    before, after = (summary["evaluation"][when] for when in ("before", "after"))
    assert after["eval/desirable"] - after["eval/undesirable"] > 0.1
    assert before["eval/desirable"] == pytest.approx(0.0, abs=1e-4)
    assert after["eval/accuracy"] > 0.9


@pytest.mark.long
def test_kd_comes_closer_to_a_served_teacher(tmp_path: Path, tiny_model: str) -> None:
    """A teacher in the worker is test_supervised_parity's."""
    from tests.tiny_model import make_tiny_model

    teacher = make_tiny_model(tmp_path / "teacher", seed=7)
    made.write(tmp_path / "train.jsonl", made.conversations(128))
    made.write(tmp_path / "eval.jsonl", made.conversations(32, seed=1))
    config = job(
        tmp_path,
        tiny_model,
        "kd",
        teacher={"path": teacher, "location": "serve", "top_k": 32},
        algorithm={"divergence": "reverse_kl", "kd_coef": 1.0},
        train={"num_steps": 20},
        placement={"cpus_per_slot": 0.5, "preset": "colocate_all"},
    )
    summary = run(config)
    before, after = (summary["evaluation"][when]["eval/divergence"] for when in ("before", "after"))
    assert after < 0.5 * before


@pytest.mark.long
def test_patience_ends_a_run(tmp_path: Path, tiny_model: str) -> None:
    made.write(tmp_path / "train.jsonl", made.conversations(32))
    made.write(tmp_path / "eval.jsonl", made.conversations(8, seed=1))
    config = job(
        tmp_path,
        tiny_model,
        "sft",
        train={"num_steps": 10, "lr": 0.0},  # nothing can get better
        eval={"every_steps": 1, "patience": 2},
    )
    assert run(config)["steps"] == 3  # the first evaluation sets the mark, two do not better it


def test_the_served_reward_model_scores_as_transformers_does(tmp_path: Path) -> None:
    """A head on an export: left-padded batches give the scores of the packed ones."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rayrlhf.batch import cu_seqlens_of, position_ids_of
    from rayrlhf.config.model import ModelConfig
    from rayrlhf.models.load import load_scorer
    from tests.tiny_model import make_tiny_model

    path = make_tiny_model(tmp_path / "rm", sequence_classification=True)
    rows = [[1, 9, 40, 2], [1, 9, 41, 42, 43, 44, 2], [1, 2]]
    lengths = [len(row) for row in rows]
    scorer = load_scorer(ModelConfig(path=path), path, device=torch.device("cpu"))
    flat = torch.tensor([token for row in rows for token in row])
    packed = scorer(flat, position_ids_of(lengths), cu_seqlens_of(lengths))
    plain: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        hidden = plain.model(**inputs).last_hidden_state
        assert plain.score(hidden)[:, -1].squeeze(-1).tolist() == pytest.approx(packed.tolist(), abs=1e-5)
