"""The policy loop on prompts with images, in one process: GRPO and PPO, with adapters and a frozen tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.tiny_vision import make_tiny_vision

GRPO = {"advantage": "grpo", "kl_coef": 0.0}
ROLLOUT = {"prompts_per_step": 4, "group_size": 6, "sampling": {"max_new_tokens": 4}}
TRAIN = {"num_steps": 3, "lr": 1e-3, "max_tokens_per_micro_batch": 128, "warmup_steps": 0}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {**GRPO, "kl_coef": 0.01, "kl_in": "loss", "kl_estimator": "k3"}},
    "ppo": {"algorithm": {"kl_coef": 0.01}},
    "grpo with adapters": {"algorithm": GRPO, "lora": {"rank": 8}},
    "grpo with a frozen tower": {
        "algorithm": GRPO,
        "freeze_vision": True,
        "train": {**TRAIN, "gradient_checkpointing": True},
    },
}
LEARNING = {
    f"learns {seed}": {
        "algorithm": GRPO,
        "seed": seed,
        "train": {**TRAIN, "num_steps": 30, "lr": 2e-3},
        "rollout": {**ROLLOUT, "prompts_per_step": 8, "group_size": 8},
    }
    for seed in (1, 2, 3)
}


def run_all(_: int, model: str, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """In a separate process, whose process group DeepSpeed uses: writes what each run reported."""
    from safetensors.torch import load_file

    from rayrlhf.policy.loop import policy_loop
    from tests.policy.one_process import config_of, run_of
    from tests.policy.vision_process import ColourScorer, VisionEngine, colour_batches

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    found: dict[str, Any] = {}
    for name, settings in runs.items():
        sections = {
            "model": {
                "path": model,
                "dtype": "float32",
                "lora": settings.get("lora"),
                "freeze_vision": settings.get("freeze_vision", False),
            },
            "algorithm": settings["algorithm"],
            "rollout": settings.get("rollout", ROLLOUT),
            # As the driver sets it for images.
            "train": {**settings.get("train", TRAIN), "share_prefixes": False},
            "data": {"train": "prompts.jsonl", "max_prompt_tokens": 32},
            "run": {"name": "loop", "dir": folder, "seed": settings.get("seed", 0)},
        }
        config = config_of(model, Path(folder), **sections)
        run, engine, reports = run_of(
            config, engine_of=VisionEngine, client=ColourScorer(config), batches=colour_batches
        )
        before = load_file(Path(model) / "model.safetensors")
        policy_loop(run)
        after = {
            spec.name: tensor.clone()
            for together in run.actor.weights()
            for spec, tensor in zip(together.specs, together.tensors(), strict=True)
        }
        found[name] = {
            "steps": reports.steps,
            "pushed": engine.pushed,
            "moved": sorted(key for key, old in before.items() if not torch.equal(after[key], old)),
            "names": sorted(before),
        }
    (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def ran(folder: Path, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    model = make_tiny_vision(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        spawn(run_all, args=(model, str(folder), runs), nprocs=1)
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ran(tmp_path_factory.mktemp("vision-loop"), RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_sampling_model_and_the_trained_one_agree_in_every_step(runs: dict[str, Any], name: str) -> None:
    steps = runs[name]["steps"]
    assert runs[name]["pushed"] == [1, 2, 3] and len(steps) == 3
    assert max(step["rollout/logprob_diff_max"] for step in steps) < 1e-4
    assert all(step["loss/actor_grad_norm"] > 0.0 for step in steps)


def test_what_is_trained(runs: dict[str, Any]) -> None:
    tower = {name for name in runs["grpo"]["names"] if name.startswith("visual.")}
    assert tower
    assert set(runs["grpo"]["moved"]) == set(runs["ppo"]["moved"]) >= tower
    assert not set(runs["grpo with a frozen tower"]["moved"]) & tower
    moved = set(runs["grpo with adapters"]["moved"])
    assert moved and not moved & tower and all("_proj" in name for name in moved)


@pytest.mark.long
def test_grpo_learns_to_name_colours_from_three_seeds(tmp_path: Path) -> None:
    """A policy that ignores the images cannot get more than a quarter."""
    runs = ran(tmp_path, LEARNING)
    assert len({run["steps"][0]["reward/mean"] for run in runs.values()}) > 1, "other samples per seed"
    for name, run in runs.items():
        rewards = [step["reward/mean"] for step in run["steps"]]
        assert sum(rewards[:3]) / 3 < 0.3, name
        assert sum(rewards[-3:]) / 3 > 0.8, name
