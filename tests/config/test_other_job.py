"""A configuration for another job is one problem, which names the job that it is for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.job_kinds import SCHEMAS
from rayrlhf.config.other_job import NAMED_JOBS, script_of_job
from rayrlhf.config.parse import load_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = {"generate": "generate-cpu", "serve_reward": "serve_reward-cpu", None: "grpo-cpu"} | {
    job: f"{job}-cpu" for job in NAMED_JOBS
}


def test_all_jobs_are_named() -> None:
    assert {None, *NAMED_JOBS} == SCHEMAS.keys()
    assert all((REPOSITORY / script_of_job(job)).is_file() for job in SCHEMAS)
    assert all(importlib.import_module(f"jobs.{job}") for job in NAMED_JOBS)


@pytest.mark.parametrize("given", [job for job in SCHEMAS if job is not None])
def test_a_job_given_the_file_of_another_names_that_job(given: str) -> None:
    """`this file is for jobs/sft.py`: one problem, not every key that the two do not share."""
    path = str(REPOSITORY / "jobs" / "configs" / f"{CONFIGS[given]}.yaml")
    for own, schema in SCHEMAS.items():
        if own == given:
            continue
        problem = only_problem(schema, path)
        assert problem.path == "job" and f"this file is for {script_of_job(given)}" in problem.got
        assert f"python {script_of_job(given)}" in problem.fix


@pytest.mark.parametrize("own", ["sft", "rm", "prm", "dpo", "kto", "kd"])
def test_the_file_of_a_policy_run_is_known_by_its_sections(own: str) -> None:
    """Such a file names no job."""
    problem = only_problem(SCHEMAS[own], str(REPOSITORY / "jobs" / "configs" / "grpo-cpu.yaml"))
    assert "this file is for jobs/ppo.py" in problem.got and problem.wanted == f"job: {own}"


def only_problem(schema: Any, path: str) -> Any:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, [path])
    (problem,) = caught.value.problems
    return problem
