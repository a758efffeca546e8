"""Detects a configuration that belongs to another job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.config.base import Problem, Section

POLICY_SCRIPT = "jobs/ppo.py"
NAMED_JOBS = (
    "generate",
    "serve_reward",
    "sft",
    "rm",
    "prm",
    "dpo",
    "kto",
    "kd",
    "rejection_sampling",
    "iterative_dpo",
    "conditional_sft",
)
# Sections of a policy run, whose config has no `job` key.
POLICY_SECTIONS = frozenset({"rollout", "reward", "critic", "ref", "algorithm"})


def script_of_job(job: str | None) -> str:
    """The job's file, `jobs/ppo.py`."""
    return POLICY_SCRIPT if job is None else f"jobs/{job}.py"


def other_job(schema: type[Section], values: Mapping[str, Any]) -> Problem | None:
    """A single problem, instead of one per key, if the files are for another job than `schema`'s."""
    own, given = _job_of(schema), values.get("job")
    fix = "run python {} with it, or give " + f"{script_of_job(own)} its own configuration"
    if isinstance(given, str) and given != own and given in NAMED_JOBS:
        wanted = f"no job, or the configuration of {POLICY_SCRIPT}" if own is None else f"job: {own}"
        return Problem(
            "job",
            f"{given}: this file is for {script_of_job(given)}",
            wanted,
            fix.format(script_of_job(given)),
        )
    foreign = [name for name in values if name in POLICY_SECTIONS and name not in schema.model_fields]
    if "job" not in values and {"reward", "rollout"} & set(foreign):
        got = f"{', '.join(foreign)}, but no job: this file is for {POLICY_SCRIPT}"
        return Problem("job", got, f"job: {own}", fix.format(POLICY_SCRIPT))
    return None


def _job_of(schema: type[Section]) -> str | None:
    field = schema.model_fields.get("job")
    return None if field is None else field.default
