"""Config schemas by job name, for commands that take the configuration of any job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.chains import CHAINS
from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.config.other_job import script_of_job
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.serve_reward import ServeRewardConfig
from rayrlhf.config.supervised import JOBS
from rayrlhf.config.yaml_tree import COMMAND_LINE, read_tree
from rayrlhf.migration.other_keys import option_problem

POLICY = None  # configs of policy runs have no `job` key
SCHEMAS: dict[str | None, Any] = {
    POLICY: PolicyRunConfig,
    "generate": GenerateRunConfig,
    "serve_reward": ServeRewardConfig,
    **JOBS,
    **CHAINS,
}


def load_any(argv: Sequence[str]) -> Any:
    """Load the configuration of the job that the files or overrides name. Raises `ConfigError`."""
    tree = read_tree(argv)
    job = tree.values.get("job")
    if not (job is None or isinstance(job, str)) or job not in SCHEMAS:
        named = [name for name in SCHEMAS if name is not None]
        problem = Problem(
            "job", got=repr(job), wanted=f"one of {', '.join(named)}, or none for ppo", fix="correct job"
        )
        options = [option_problem(None, *option, COMMAND_LINE) for option in tree.options]
        raise ConfigError([*options, *tree.problems, problem], tree.source)
    return load_config(SCHEMAS[job], argv)


def script_of(config: Any) -> str:
    """The job's file, `jobs/ppo.py`."""
    return script_of_job(getattr(config, "job", None))
