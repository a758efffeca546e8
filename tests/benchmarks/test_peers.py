"""The arithmetic of benchmarks/peers and its page, on numbers worked out by hand. Nothing here is timed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import report, workloads
from benchmarks.peers.arithmetic import share_of_limit, speedup, spread, steady_rate
from benchmarks.peers.cases.case import from_steps
from benchmarks.peers.cases.registry import CASES
from benchmarks.peers.measure import CommandFailed, Line, Ran, run_command
from benchmarks.peers.products import NUM_WEIGHTS, PRODUCTS


def test_the_rate_is_of_all_measured_steps_together() -> None:
    # 100 + 300 tokens in 1 + 2 s; the mean of the two rates would be 125.
    assert steady_rate([9, 100, 300], [50.0, 1.0, 2.0], warmup=1) == pytest.approx(400 / 3)


def test_a_rate_needs_a_step_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match="none is left"):
        steady_rate([1], [1.0], warmup=1)
    with pytest.raises(ValueError, match="one each per step"):
        steady_rate([1, 2], [1.0], warmup=0)


def test_a_ratio_is_of_the_medians_and_its_range_of_the_pairs() -> None:
    found = speedup([120.0, 90.0, 100.0], [80.0, 90.0, 50.0], higher_is_better=True)
    assert found.median == pytest.approx(100 / 80)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(2.0))


def test_fewer_seconds_are_as_many_times_as_fast() -> None:
    found = speedup([10.0, 20.0], [30.0, 30.0], higher_is_better=False)
    assert found.median == pytest.approx(2.0)  # 30 s over 15 s
    assert (found.low, found.high) == (pytest.approx(1.5), pytest.approx(3.0))


def test_a_pair_without_its_other_half_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted pairs"):
        speedup([1.0, 2.0], [1.0], higher_is_better=True)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_the_share_of_the_limit() -> None:
    # 100 tokens/s x 6 x 100 M = 60 GFLOP/s, of 150.
    assert share_of_limit(100_000_000, 100.0, 150e9) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="more than 0"):
        share_of_limit(1, 1.0, 0.0)


def test_the_products_are_those_of_the_model() -> None:
    """Per layer q, o: 576 x 576; k, v: 576 x 192; three of 576 x 1536; and the head, 576 x 49152."""
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert NUM_WEIGHTS == 30 * layer + 576 * 49_152 == 134_479_872
    assert sum(product.times for product in PRODUCTS) == 30 * 7 + 1


def test_rows_are_the_same_each_time_and_vary_in_length() -> None:
    rows = workloads.conversations(50, mean_words=40)
    assert rows == workloads.conversations(50, mean_words=40)
    lengths = {len(row["messages"][-1]["content"].split()) for row in rows}
    assert max(lengths) > 3 * min(lengths)
    pair = workloads.preferences(1, mean_words=10)[0]
    assert pair["chosen"][:-1] == pair["rejected"][:-1]
    assert pair["chosen"][-1] != pair["rejected"][-1]
    assert {len(row["prompt"].split()) for row in workloads.prompts(9, words=7)} == {7}


def test_a_jobs_metrics_become_a_rate_and_are_held_against_the_clock() -> None:
    rows = [
        {"time/step": 9.0, "data/tokens": 50.0, "time/update": 5.0, "loss/model": 3.0},
        {"time/step": 8.0, "data/tokens": 50.0, "time/update": 4.0, "loss/model": 2.5},
        {"time/step": 2.0, "data/tokens": 100.0, "time/update": 1.0, "loss/model": 2.0},
        {"time/step": 3.0, "data/tokens": 300.0, "time/update": 2.0, "loss/model": 1.0},
    ]
    # The first step began 30 - 9 s after the command; the two measured ones took 44 - 38 s by the clock.
    stamps = (30.0, 38.0, 40.5, 44.0)
    lines = [Line(seconds, f"  0:30 step {i}/4  loss 1.0") for i, seconds in enumerate(stamps, 1)]
    ran = Ran([Line(1.0, "started a local Ray"), *lines], 40.0, 0.0, 7)
    found = from_steps(rows, ran, parts=["time/update"])
    assert found.value == pytest.approx(400 / 5)
    assert found.startup_seconds == pytest.approx(21.0)
    assert found.parts == {"time/update": pytest.approx(1.5)}
    assert found.notes == {"wall_over_metrics": pytest.approx(6 / 5)}
    assert found.losses == [3.0, 2.5, 2.0, 1.0]
    assert from_steps(rows, ran, per_second=False).value == pytest.approx(2.5)


def python(code: str, folder: Path, **more: Any) -> Ran:
    return run_command(
        [sys.executable, "-c", code],
        env=dict(os.environ),
        cwd=folder,
        log=folder / "log",
        cores=sorted(os.sched_getaffinity(0)),
        deadline_seconds=60,
        **more,
    )


def test_a_command_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"status 3.*\n.*the reason"):
        python("print('the reason'); raise SystemExit(3)", tmp_path)


def test_a_command_is_stopped_after_the_line_that_was_waited_for(tmp_path: Path) -> None:
    code = "import time\nprint('step 2/2', flush=True)\ntime.sleep(600)"
    ran = python(code, tmp_path, ends_at=lambda line: "2/2" in line)
    assert [line.text for line in ran.lines] == ["step 2/2"]


def test_the_endless_model_has_another_end_of_text(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    added = [{"id": 2, "content": "<|im_end|>"}, {"id": 7, "content": workloads.UNUSED_TOKEN}]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (model / "chat_template.jinja").write_text("")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    for name in ("config.json", "generation_config.json"):
        (model / name).write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}))
    workloads.endless_model(model, tmp_path / "copy")
    copy = workloads.endless_model(model, tmp_path / "copy")  # over the first
    assert json.loads((copy / "config.json").read_text()) == {"eos_token_id": 7, "pad_token_id": 2}
    assert json.loads((copy / "generation_config.json").read_text())["eos_token_id"] == 7
    assert json.loads((copy / "tokenizer_config.json").read_text())["eos_token"] == workloads.UNUSED_TOKEN
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert not (copy / "chat_template.jinja").exists()


def run(value: float) -> dict[str, Any]:
    return {"value": value, "startup_seconds": 12.0, "peak_bytes": 2_500_000_000}


def result(**runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": "2026-01-01 00:00",
        "runs": runs,
        "failures": {"control": "status 1: python -m x …\nValueError: no"} if "control" not in runs else {},
        "model": "SmolLM2-135M-Instruct",
        "limits": [{"fp32": 150e9, "bf16": 5e9}],
        "machine": {
            "cpu": "a CPU",
            "cores": 2,
            "flags": ["avx2"],
            "memory_gb": 24.0,
            "load_average": 0.1,
            "ours": {"torch": "1"},
            "peers": {"trl": "2"},
        },
    }


def test_the_page_has_ratios_shares_and_what_did_not_run() -> None:
    found = result(ours=[run(100.0), run(120.0)], TRL=[run(80.0), run(80.0)])
    page = report.markdown({"sft-packed": json.loads(json.dumps(found))})
    assert "| ours | 110 real tokens/s | 2 |" in page
    assert "**1.38** (1.25 to 1.50)" in page
    share = 6 * NUM_WEIGHTS * 110 / 150e9
    assert f"| {share:.0%} |" in page
    assert "| control | failed: status 1: python -m x … |" in page
    assert "ValueError: no" in page


def test_every_case_compares_ours_with_a_side_that_it_runs() -> None:
    for case in CASES.values():
        assert "ours" in case.sides
        assert case.peer in case.sides
        assert case.peer != "ours"
