"""Online algorithms: GRPO, GRPO that runs ahead of a slow reward, and PPO with a critic."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import workloads
from benchmarks.peers.cases.case import (
    CONTROL,
    OURS,
    TRL,
    Case,
    Measured,
    Setting,
    both_precisions,
    from_steps,
    run_job,
    run_script,
)
from jobs.demo.model import REPOSITORY

REWARDS = REPOSITORY / "benchmarks" / "peers" / "theirs" / "rewards.py"
PROMPT_WORDS = 24
NUM_PROMPTS, GROUP_SIZE, RESPONSE_TOKENS = 8, 4, 64
PPO_PROMPTS = 8
ASYNC_PROMPTS, ASYNC_RESPONSE_TOKENS = 4, 32
MICRO_BATCH_TOKENS = 1024
FIRST_ROLLOUT = re.compile(r"\brollout is up\b|\d:\d\d rollout\s*$")  # the engine is up; a worker asks it
PARTS = ["time/rollout", "time/logprobs", "time/update_actor", "time/update_critic", "time/weight_sync"]
SYNC, NO_LATENCY = "ours, synchronous", "ours, synchronous, reward without latency"


def data(setting: Setting, latency: float = 0.0) -> Path:
    rows = [row | {"latency": latency} for row in workloads.prompts(256, words=PROMPT_WORDS)]
    return workloads.write(rows, setting.folder / f"prompts-{latency:g}.jsonl")


def model(setting: Setting) -> Path:
    return workloads.endless_model(setting.model, setting.folder / "endless")


def config(setting: Setting, **changes: dict[str, Any]) -> dict[str, Any]:
    """GRPO without KL: no reference on any side. `changes` are merged, a section each."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model(setting))},
        "data": {
            "train": f"jsonl@{data(setting)}",
            "prompt_key": "prompt",
            "apply_chat_template": False,
            "max_prompt_tokens": 64,
        },
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
        "rollout": {
            "prompts_per_step": NUM_PROMPTS,
            "group_size": GROUP_SIZE,
            "sampling": {"max_new_tokens": RESPONSE_TOKENS},
            "kv_cache_bytes": 2**28,
            "num_threads": setting.threads,
        },
        "reward": {"sources": [{"type": "function", "function": f"{REWARDS}:variety"}]},
        "placement": {"preset": "colocate_all"},
        "train": {
            "num_steps": setting.num_steps,
            "lr": 1e-6,
            "zero_stage": 0,
            "max_tokens_per_micro_batch": MICRO_BATCH_TOKENS,
            "num_threads": setting.threads,
        },
        "checkpoint": {"export": False, "every_steps": None},
    }
    for section, values in changes.items():
        base[section] = base.get(section, {}) | values
    return base


def ours(setting: Setting, name: str, **changes: dict[str, Any]) -> Measured:
    rows, ran = run_job(setting, name, "ppo", config(setting, **changes))
    measured = from_steps(rows, ran, parts=PARTS, per_second=False)
    measured.notes["response_tokens"] = rows[-1]["rollout/response_tokens_mean"]
    stamps = [line.seconds for line in ran.lines if FIRST_ROLLOUT.search(line.text)]
    return replace(measured, startup_seconds=max(stamps, default=None))


def trl_grpo(setting: Setting, name: str, *, bf16: bool = False) -> Measured:
    batch = 8  # TRL's default; a step is all samples
    options = {
        "model": model(setting),
        "data": data(setting),
        "group": GROUP_SIZE,
        "batch": batch,
        "accumulate": NUM_PROMPTS * GROUP_SIZE // batch,
        "response": RESPONSE_TOKENS,
    }
    return run_script(setting, name, "grpo", options, per_second=False, bf16=bf16)


def ours_ppo(setting: Setting, name: str) -> Measured:
    return ours(
        setting,
        name,
        algorithm={"advantage": "gae", "kl_coef": 0.01},
        critic={"lr": 1e-5},
        rollout=config(setting)["rollout"] | {"prompts_per_step": PPO_PROMPTS, "group_size": 1},
    )


def ppo_control(setting: Setting, name: str, *, bf16: bool = False) -> Measured:
    options = {
        "model": model(setting),
        "data": data(setting),
        "prompts": PPO_PROMPTS,
        "response": RESPONSE_TOKENS,
        "micro": 8,
    }
    return run_script(setting, name, "ppo", options, per_second=False, bf16=bf16)


def slow_reward(setting: Setting, name: str, *, ahead: bool, with_latency: bool = True) -> Measured:
    """The latency is what a step takes without it, as the run before has measured."""
    step_file = setting.folder / "async-step.json"
    latency = json.loads(step_file.read_text()) if with_latency else 0.0
    sampling = {"max_new_tokens": ASYNC_RESPONSE_TOKENS}
    rollout = config(setting)["rollout"] | {"prompts_per_step": ASYNC_PROMPTS, "sampling": sampling}
    algorithm: dict[str, Any] = {}
    if ahead:
        rollout["max_staleness"] = 1
        algorithm["rollout_correction"] = {"mode": "truncate", "level": "token", "high": 2.0}
    measured = ours(
        setting,
        name,
        data=config(setting)["data"] | {"train": f"jsonl@{data(setting, round(latency, 2))}"},
        algorithm=config(setting)["algorithm"] | algorithm,
        rollout=rollout,
        reward={
            "sources": [{"type": "function", "function": f"{REWARDS}:slow_variety"}],
            "timeout_seconds": 300,
        },
    )
    if not with_latency:
        step_file.write_text(json.dumps(measured.value))
    measured.notes["latency_seconds"] = latency
    return measured


CASES = [
    Case(
        name="grpo",
        title="GRPO, 8 prompts x 4 samples x 64 tokens",
        unit="s per step",
        higher_is_better=False,
        sides={OURS: ours, **both_precisions(TRL, trl_grpo)},
        peer=TRL,
        compared="The same prompts, responses of exactly 64 tokens (no end of text before), no KL, one "
        "update per batch, a reward that counts distinct characters. A step is generation, rewards, "
        "update and, for ours, the push of the weights to the engine.",
        differs="TRL generates with transformers' generate in the trainer's process (its vLLM modes do "
        "not run on CPUs); ours with a vLLM engine in a separate process, the two alternating on the "
        "same cores, and trains on each group's prompt once.",
    ),
    Case(
        name="grpo-async",
        title="GRPO with a reward as slow as the rest of the step: rollouts ahead of training, or "
        "alternating",
        unit="s per step",
        higher_is_better=False,
        sides={
            NO_LATENCY: partial(slow_reward, ahead=False, with_latency=False),
            SYNC: partial(slow_reward, ahead=False),
            OURS: partial(slow_reward, ahead=True),
        },
        peer=SYNC,
        compared="4 prompts x 4 samples x 32 tokens; the reward function sleeps as long as a "
        "synchronous step without it has just taken.",
        differs="rollout.max_staleness is 1, with truncated importance weights; the alternating run has "
        "neither.",
        ideal=2.0,
    ),
    Case(
        name="ppo",
        title="PPO with a critic, 8 prompts x 64 tokens",
        unit="s per step",
        higher_is_better=False,
        sides={OURS: ours_ppo, **both_precisions(CONTROL, ppo_control)},
        peer=CONTROL,
        compared="Actor, critic, reference and reward function; GAE, KL in the reward, one update of "
        "each per batch, responses of exactly 64 tokens.",
        differs="TRL has no PPO. The control is a loop of 150 lines as DeepSpeed-Chat's was: "
        "transformers' generate, left padding, whole logits, all in one process.",
    ),
]
