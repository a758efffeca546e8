"""Serve replicas stay light: heavy modules are imported only by the actors on the slots."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"transformers", "deepspeed", "vllm", "peft", "math_verify"}


@pytest.mark.slow
def test_replicas_import_nothing_heavy() -> None:
    """They cost seconds and about 100 MB per replica, in addition to the actor that needs them anyway."""
    replicas = [
        "rayrlhf.reward.functions",
        "rayrlhf.reward.model_deployment",
        "rayrlhf.reward.remote",
        "rayrlhf.reward_server.deployment",
        "rayrlhf.reward_server.text_model",
        "rayrlhf.reward.verifiable",
        "rayrlhf.rollout.engine",
        "rayrlhf.environments.deployment",
        "rayrlhf.rollout.logprob_server",
        "rayrlhf.train.frozen_server",
    ]
    code = f"import sys, {', '.join(replicas)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
