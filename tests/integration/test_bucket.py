"""PPO with its data, checkpoints, metrics and export in a bucket; a second machine goes on with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config.parse import dump_resolved
from rayrlhf.storage.folder import RemoteFolder
from rayrlhf.train.manifest import MANIFEST
from tests.integration.policy_runs import tiny_run, write_prompts
from tests.s3_server import BUCKET, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
URL = f"s3://{BUCKET}/runs"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        yield


def run(folder: Path, config: Any, machine: str) -> subprocess.CompletedProcess[str]:
    """Start the job as on a machine of its own: another cache of data and of runs."""
    file = folder / "config.yaml"
    file.write_text(dump_resolved(config))
    return subprocess.run(
        [sys.executable, "jobs/ppo.py", str(file), f"run.local_dir={folder / machine}"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "RAYRLHF_DATA_CACHE": str(folder / f"{machine}-data"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_ppo_reads_from_saves_to_resumes_from_and_exports_to_a_bucket(
    tmp_path: Path, tiny_model: str
) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 64)
    RemoteFolder(f"s3://{BUCKET}/data").upload(tmp_path, ["prompts.jsonl"])

    def config(steps: int) -> Any:
        return tiny_run(
            tmp_path,
            tiny_model,
            run={"name": "ppo", "dir": URL},
            data={"train": f"s3://{BUCKET}/data/prompts.jsonl"},
            train={"num_steps": steps},
            checkpoint={"every_steps": 1, "keep": 2},
            observe={"tensorboard": True},
        )

    first = run(tmp_path, config(2), "one")
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{URL}/ppo" in first.stdout and "Traceback" not in first.stdout
    folder = RemoteFolder(f"{URL}/ppo")
    found = folder.sizes()
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json", "placement.json"):
        assert found[name] > 0, name
    assert any(name.startswith("tensorboard/events") for name in found)
    assert folder.child("checkpoints").folders() == ["step_000001", "step_000002"]
    files = json.loads(folder.child("checkpoints/step_000002").read(MANIFEST) or "")["files"]
    assert {f"checkpoints/step_000002/{name}": file["bytes"] for name, file in files.items()}.items() <= (
        found.items()
    )
    assert not [name for name in found if name.startswith("scratch")]
    exported = RemoteFolder(f"{URL}/ppo/export")
    exported.download(exported.sizes(), tmp_path / "after-2")

    second = run(tmp_path, config(3), "two")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resuming after step 2" in second.stdout and "files of this run fetched" in second.stdout
    lines = [json.loads(line) for line in (folder.read("metrics.jsonl") or b"").splitlines()]
    assert [line["step"] for line in lines if "loss/actor" in line] == [1, 2, 3]
    assert folder.child("checkpoints").folders() == ["step_000002", "step_000003"], "checkpoint.keep=2"
    exported.download(exported.sizes(), tmp_path / "after-3")
    before, after = weights(tmp_path / "after-2"), weights(tmp_path / "after-3")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in after)

    damaged = folder.child("checkpoints/step_000003")
    name = next(name for name in damaged.sizes() if name.endswith("model_states.pt"))
    damaged.write(name, "cut off")
    third = run(tmp_path, config(3), "three")
    assert third.returncode == 0, third.stdout + third.stderr
    assert "warning: checkpoint step_000003 is damaged: " in third.stdout
    assert "resuming after step 2" in third.stdout


def test_a_bucket_that_is_not_there_is_said_at_once(tmp_path: Path, tiny_model: str) -> None:
    config = tiny_run(tmp_path, tiny_model, run={"name": "ppo", "dir": "s3://no-such-bucket/runs"})
    done = run(tmp_path, config, "one")
    assert done.returncode == 2 and "run.dir" in done.stderr + done.stdout
    assert "no-such-bucket" in done.stderr + done.stdout and "Traceback" not in done.stderr + done.stdout
