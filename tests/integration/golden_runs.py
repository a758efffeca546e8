"""Short runs of every kind of job, whose numbers are recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from jobs.environments.calculator import make_rows, write_rows
from rayrlhf.policy.driver import run_policy
from rayrlhf.supervised.driver import run_supervised
from tests.integration import supervised_data as made
from tests.integration.policy_runs import tiny_run
from tests.integration.supervised_runs import job as tiny_job
from tests.tiny_model import make_tiny_model

NUM_STEPS = 3
LR = 1e-4  # so small that another processor's rounding does not grow to other responses
GROUPS: dict[str, Any] = {"group_size": 4, "prompts_per_step": 8}
NO_CRITIC: dict[str, Any] = {"critic": None, "rollout": GROUPS}
KL_IN_LOSS = {"kl_coef": 0.05, "kl_in": "loss", "kl_estimator": "k3"}
TWO_UPDATES = {"mini_batches": 2, "updates_per_batch": 2}
DISAGGREGATED: dict[str, Any] = {"placement": {"preset": "disaggregated", "cpus_per_slot": 0.5}}

POLICY: dict[str, dict[str, Any]] = {
    "grpo": {**NO_CRITIC, "algorithm": {"advantage": "grpo", **KL_IN_LOSS, **TWO_UPDATES}},
    "grpo_two_ranks": {
        **NO_CRITIC,
        "algorithm": {"advantage": "grpo", **KL_IN_LOSS, **TWO_UPDATES},
        "train": {"num_workers": 2, "zero_stage": 3},
    },
    "ppo": {"algorithm": {"kl_coef": 0.01, **TWO_UPDATES}},
    "ppo_remote_critic": {**DISAGGREGATED, "algorithm": {"kl_coef": 0.01, **TWO_UPDATES}},
    "reinforce_pp": {
        **NO_CRITIC,
        "algorithm": {
            "advantage": "reinforce_pp",
            "kl_coef": 0.05,
            "kl_controller": "adaptive",
            "kl_target": 0.05,
        },
    },
    "dapo": {
        **NO_CRITIC,
        "algorithm": {
            "advantage": "grpo",
            "clip_high": 0.28,
            "kl_coef": 0.0,
            "mini_batches": 2,
            "dynamic_sampling": {"max_prompt_batches": 3},
        },
        # Vowels are rare at first: groups without any are dropped.
        "rollout": {"group_size": 2, "prompts_per_step": 4, "sampling": {"max_new_tokens": 4}},
    },
    "async": {
        **NO_CRITIC,
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
        "rollout": {**GROUPS, "max_staleness": 1},
        # Which tokens are sampled before the weights arrive depends on the clock: they stay what they are.
        "train": {"lr": 0.0},
    },
    "agent": {
        **NO_CRITIC,
        "data": {"max_prompt_tokens": 160},
        "algorithm": {"advantage": "rloo", "kl_coef": 0.0},
        "rollout": {
            **GROUPS,
            "sampling": {"max_new_tokens": 24, "stop": ["a", "e"]},
            "environment": {
                "environment": "jobs.environments.calculator:Calculator",
                "arguments": {"instructions": "", "form_reward": 0.1},
                "max_turns": 3,
                "max_response_tokens": 128,
            },
        },
        "reward": {"sources": [{"type": "environment"}]},
    },
}
SUPERVISED: dict[str, dict[str, Any]] = {
    "sft": {"job": "sft"},
    "rm": {"job": "rm"},
    "dpo": {"job": "dpo", "ref": {"precompute": True}},
    "kto": {"job": "kto"},
    "kd": {"job": "kd", "teacher": {"top_k": 32}},
    "sft_two_ranks": {"job": "sft", "train": {"num_workers": 2, "zero_stage": 2}},
}
ROWS = {
    "sft": made.conversations,
    "kd": made.conversations,
    "rm": made.pairs,
    "dpo": made.pairs,
    "kto": made.judged,
}
NAMES = (*POLICY, *SUPERVISED)

# What a step says of its numbers; the rest is about time and memory.
KEPT = (
    "loss/",
    "kl/",
    "reward/",
    "eval/",
    "data/tokens",
    "data/samples",
    "rollout/samples",
    "rollout/response",
)


def fingerprint(name: str, folder: Path, model: str) -> dict[str, Any]:
    """Runs `name` in `folder`: metrics of every step, and hashes of what was sampled and of the export."""
    run = policy_run(name, folder, model) if name in POLICY else supervised_run(name, folder, model)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: v for key, v in line.items() if key.startswith(KEPT)} for line in lines],
        "rollouts": hash_of_rollouts(run / "rollouts.jsonl"),
        "export": hash_of_weights(run / "export"),
    }


def policy_run(name: str, folder: Path, model: str) -> Path:
    changes = json.loads(json.dumps(POLICY[name]))
    changes["train"] = {"num_steps": NUM_STEPS, "lr": LR, "max_failures": 0, **changes.get("train", {})}
    if "critic" not in changes:
        changes["critic"] = {"lr": LR}
    changes["observe"] = {"rollouts_per_step": 1000, "tensorboard": False}
    if name == "agent":
        rows = write_rows(folder / "sums.jsonl", make_rows(64, seed=0, largest=9, num_terms=2))
        changes["data"]["train"] = str(rows)
    config = tiny_run(folder, model, **changes)
    assert run_policy(config) == 0
    return Path(config.run.path)


def supervised_run(name: str, folder: Path, model: str) -> Path:
    given = json.loads(json.dumps(SUPERVISED[name]))
    job, train = given.pop("job"), given.pop("train", {})
    if job == "kd":
        given["teacher"]["path"] = make_tiny_model(folder / "teacher", seed=7)
    made.write(folder / "train.jsonl", ROWS[job](64))
    made.write(folder / "eval.jsonl", ROWS[job](16, seed=1))
    train = {"num_steps": NUM_STEPS, "lr": LR, **train}
    config = tiny_job(folder, model, job, run={"name": name}, train=train, **given)
    assert run_supervised(config) == 0
    return Path(config.run.path)


def hash_of_rollouts(path: Path) -> str | None:
    """Of every response with its group, its reward and its version, in the order of groups."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("step", "group", "row_id", "prompt", "response", "reward", "truncated", "turns")
    lines = sorted(json.dumps([row[key] for key in keys]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_of_weights(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(name.encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
