"""Images from data files to a trained policy: the engine reads the same tokens and images as the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from rayrlhf.data.store import ExampleStore
from rayrlhf.policy.driver import run_policy
from rayrlhf.supervised.driver import run_supervised
from tests.integration.policy_runs import tiny_run
from tests.integration.supervised_runs import job
from tests.tiny_vision import make_tiny_vision, png

START_SECONDS = 180


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_log_probs_of_engine_and_trainer_agree_after_pushes(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_vision(tmp_path / "model", tied=tied)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.vision_probe", folder],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and max(found) < 1e-4, found


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def name_colour(prompts: list[str], responses: list[str], labels: list[Any], **columns: Any) -> list[float]:
    """Share of ASCII characters whose code says the colour, modulo 4: a blind policy gets a quarter."""
    colours = [list(COLOURS).index(label) for label in labels]
    return [
        sum(ord(c) < 128 and ord(c) % 4 == colour for c in said) / max(1, len(said))
        for said, colour in zip(responses, colours, strict=True)
    ]


def write_images(folder: Path, count: int) -> Path:
    """Prompts with the path of an image, in turn as a column and as a content part."""
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(width=16, height=16, colour=colour))
    lines = []
    for i in range(count):
        label = list(COLOURS)[i % 4]
        row = {"prompt": "<image>", "images": [f"{label}.png"]}
        if i % 8 > 3:
            part = {"type": "image_url", "image_url": {"url": f"{label}.png"}}
            row = {"prompt": [{"role": "user", "content": [part]}]}
        lines.append(json.dumps({**row, "label": label}) + "\n")
    (folder / "images.jsonl").write_text("".join(lines))
    return folder / "images.jsonl"


def colour_run(folder: Path, **changes: Any) -> Any:
    model = make_tiny_vision(folder / "model")
    source = {"type": "function", "function": "tests.integration.test_vision:name_colour"}
    sections = {
        "data": {
            "train": str(write_images(folder, 64)),
            "max_prompt_tokens": 32,
            "label_key": "label",
        },
        "critic": None,
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
        "rollout": {"prompts_per_step": 8, "group_size": 8, "sampling": {"max_new_tokens": 4}},
        "reward": {"sources": [source]},
        "train": {"num_steps": 3},
    }
    for section, values in changes.items():
        sections[section] = {**(sections.get(section) or {}), **values}
    return tiny_run(folder, model, **sections)


def steps_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "reward/mean" in row]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"advantage": "gae", "kl_coef": 0.001}, "critic": {"lr": 1e-3}},
        pytest.param({"model": {"lora": {"rank": 8}}, "train": {"num_workers": 2}}, marks=pytest.mark.long),
        pytest.param({"train": {"num_workers": 2, "zero_stage": 3}}, marks=pytest.mark.long),
    ],
    ids=["ppo", "grpo with adapters", "grpo with partitioned weights"],
)
def test_a_policy_run_on_images(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The engine samples what the trainer trains, from files to an export that transformers opens."""
    assert run_policy(colour_run(tmp_path, **changes)) == 0
    steps = steps_of(tmp_path)
    assert len(steps) == 3
    assert max(step["rollout/logprob_diff_max"] for step in steps) < 1e-3
    export = tmp_path / "runs/tiny/export"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert AutoImageProcessor.from_pretrained(export).patch_size == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_grpo_learns_to_name_colours(tmp_path: Path, seed: int) -> None:
    config = colour_run(tmp_path, run={"seed": seed}, train={"num_steps": 60}, checkpoint={"every_steps": 60})
    assert run_policy(config) == 0
    rewards = [step["reward/mean"] for step in steps_of(tmp_path)]
    print(" ".join(f"{reward:.3f}" for reward in rewards))
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8, rewards


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_supervised_jobs_on_images_count_unusable_ones(tmp_path: Path, name: str) -> None:
    model = make_tiny_vision(tmp_path / "model")
    write_images(tmp_path, 4)
    (tmp_path / "broken.png").write_bytes(png(width=32, height=32, seed=0)[:500])
    names = list(COLOURS)
    rows = [
        {
            "prompt": "<image>?",
            "images": [f"{names[i % 4]}.png"],
            "response": names[i % 4],
            "wrong": names[(i + 1) % 4],
            "label": True,
        }
        for i in range(32)
    ]
    bad = [{**rows[0], "images": images} for images in (["none.png"], ["broken.png"], [], ["red.png"] * 2)]
    if name == "kto":
        rows += [{**row, "response": row["wrong"], "label": False} for row in rows]
    for file, given in (("train", [*rows, *bad]), ("eval", rows[:8])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    keys = {"chosen_key": "response", "rejected_key": "wrong"} if name == "dpo" else {}
    config = job(
        tmp_path,
        model,
        name,
        data={"on_bad_row": "skip", **keys},
        train={"num_steps": 20, "num_workers": 2, "zero_stage": 2},
    )
    assert run_supervised(config) == 0
    summary = json.loads((Path(config.run.path) / "summary.json").read_text())
    before, after = (summary["evaluation"][when]["eval/loss"] for when in ("before", "after"))
    assert after < (0.9 if name == "kto" else 0.5) * before
    [store] = Path(config.run.path).rglob("train*.arrow")
    assert ExampleStore.open(store).counts["skipped_bad"] == 4
    AutoModelForImageTextToText.from_pretrained(summary["export"])
