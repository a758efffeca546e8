"""A colocated run with the control flow of GPUs: nobody takes memory in the turn of others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.parse import dump_resolved
from tests.integration.fake_cluster import fake_cluster
from tests.integration.policy_runs import tiny_run
from tests.integration.pretend_gpu import CAPACITY, REPOSITORY, Settings
from tests.integration.pretend_gpu.ledger import Ledger
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_ENGINES, NUM_TRAINERS, NUM_STEPS = 8, 2, 3
RUN_SECONDS = 600


def config_of(folder: Path, *, offload_weights: bool) -> Any:
    model = make_tiny_model(folder / "policy")
    reward = make_tiny_model(folder / "reward", seed=1, sequence_classification=True)
    return tiny_run(
        folder,
        model,
        critic=None,
        algorithm={"advantage": "grpo", "kl_coef": 0.01, "kl_in": "loss", "kl_estimator": "k2"},
        ref={"location": "serve", "engine": "packed"},
        reward={"sources": [{"type": "model", "path": reward}]},
        rollout={
            "num_engines": NUM_ENGINES,
            "prompts_per_step": 8,
            "group_size": 2,
            "weight_sync": {"max_logprob_jump": None},
            "sampling": {"max_new_tokens": 8},
        },
        placement={"preset": "colocate_all", "cpus_per_slot": 0.25},
        train={
            "num_steps": NUM_STEPS,
            "num_workers": NUM_TRAINERS,
            "offload_weights_between": offload_weights,
        },
        checkpoint={"every_steps": 1, "export": False},
        observe={"console": "lines", "tensorboard": False},
        eval=None,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def trainer_pid(run_path: Path) -> int:
    workers = json.loads((run_path / "placement.json").read_text())["workers"]
    return next(worker["pid"] for worker in workers if worker["role"] == "actor")


@pytest.mark.parametrize(
    "offload_weights, engine_share",
    # With such engines the trainers' weights must leave the GPU of the served models.
    [(False, 0.5), pytest.param(True, 0.75, marks=pytest.mark.long)],
)
def test_the_sum_never_exceeds_a_gpu_and_nothing_loads_while_an_engine_measures(
    tmp_path: Path, offload_weights: bool, engine_share: float
) -> None:
    config = config_of(tmp_path, offload_weights=offload_weights)
    ledger = Ledger(tmp_path / "ledger", CAPACITY)
    settings = Settings(folder=str(ledger.folder), num_engines=NUM_ENGINES, engine_share=engine_share)
    environment = settings.environment()
    file, log = tmp_path / "config.yaml", tmp_path / "log"
    file.write_text(dump_resolved(config))
    with (
        fake_cluster(nodes=1, cpus=6, gpus=NUM_ENGINES, environment=environment) as cluster,
        log.open("w") as output,
    ):
        run = subprocess.Popen(
            [sys.executable, "jobs/ppo.py", str(file)],
            cwd=REPOSITORY,
            env={**environment, "RAY_ADDRESS": cluster.address},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # A trainer dies while its requests run: its successor finds them still running.
        wait_until(lambda: "step 1/3" in log.read_text(), run, log)
        settings.endless.touch()
        wait_until(lambda: ledger.arrived("endless request") > 0, run, log)
        settings.endless.unlink()
        os.kill(trainer_pid(Path(config.run.path)), signal.SIGKILL)
        assert run.wait(RUN_SECONDS) == 0, log.read_text()
    problems = ledger.problems()
    assert not problems, "\n".join(problems)
    counts = Counter((event["who"], event["what"]) for event in ledger.events())
    print(counts)
    assert counts["engine", "has measured"] == NUM_ENGINES, "none failed and started again"
    assert counts["trainer", "took states"] >= NUM_TRAINERS * (1 + NUM_STEPS)
    if offload_weights:
        assert counts["trainer", "gave weights"] >= NUM_TRAINERS * NUM_STEPS
    assert counts["engine", "took kv_cache"] >= NUM_ENGINES * NUM_STEPS
    assert counts["engine", "aborted endless requests"] >= 1, "the trainer must die in a rollout"
    assert counts["reward model", "took model"] >= 1 and counts["reference", "took rest of the model"] >= 1
