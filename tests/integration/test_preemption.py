"""A node that a cloud takes away with notice: the run saves, and goes on from there on a spare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.parse import dump_resolved
from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train.checkpoint import TRAIN_FOLDER, newest_step
from tests.integration.fake_cluster import FakeCluster, fake_cluster
from tests.integration.supervised_data import conversations, write
from tests.integration.supervised_runs import job
from tests.integration.test_interruptions import said, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
NOTICE_SECONDS = 60.0
EARLY_SECONDS = 10.0  # that the node is gone before its deadline
NUM_STEPS = 20_000  # more than there is time for


def config_of(folder: Path, model: str) -> Any:
    """Saves on notice alone, and survives no failure."""
    write(folder / "train.jsonl", conversations(512))
    return job(
        folder,
        model,
        "sft",
        data={"train": str(folder / "train.jsonl"), "max_tokens": 96, "eval": []},
        train={"num_workers": 2, "num_steps": NUM_STEPS, "samples_per_step": 8, "max_failures": 0},
        checkpoint={"every_steps": NUM_STEPS, "export": False},
    )


@contextmanager
def started(config: Any, cluster: FakeCluster) -> Iterator[subprocess.Popen[str]]:
    file = Path(config.run.dir).parent / "sft.yaml"
    file.write_text(dump_resolved(config))
    with subprocess.Popen(
        [sys.executable, "jobs/sft.py", str(file)],
        cwd=REPOSITORY,
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_a_run_goes_on_from_the_step_of_the_notice(tmp_path: Path, tiny_model: str) -> None:
    config = config_of(tmp_path, tiny_model)
    run_path = Path(config.run.path)
    with (
        fake_cluster(nodes=3, cpus=2, gpus=1) as cluster,  # one of them is a spare
        started(config, cluster) as process,
    ):
        seen: list[str] = []
        lines = said(process, seen)
        until(lines, f"step 5/{NUM_STEPS}")
        before = nodes_of(run_path)
        deadline = time.monotonic() + NOTICE_SECONDS
        cluster.announce_removal(before[1], NOTICE_SECONDS)
        notice = until(lines, "is to be taken away")
        assert re.search(r"the node of rank 1 is to be taken away in [2-6]\d s: saving a checkpoint", notice)
        while not (saved := newest_step(LocalFolder(run_path / TRAIN_FOLDER))):
            assert time.monotonic() < deadline
            until(lines, "step ")
        print(f"saved after step {saved}, {deadline - time.monotonic():.0f} s before the deadline")

        while time.monotonic() < deadline - EARLY_SECONDS:
            until(lines, "step ")
        cluster.kill_node(before[1])
        assert until(lines, "resuming").endswith(f"resuming after step {saved}\n")
        until(lines, f"step {saved + 3}/{NUM_STEPS}")
        after = nodes_of(run_path)
        assert after[0] == before[0] and after[1] not in before
    whole = "".join(seen)
    assert whole.count("is to be taken away") == 1
    assert process.returncode == 143


def nodes_of(run_path: Path) -> list[str]:
    return [slot["node"] for slot in json.loads((run_path / "placement.json").read_text())["slots"]]
