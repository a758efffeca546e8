"""Online policy optimisation: python jobs/ppo.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]"""

from __future__ import annotations

import sys

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(PolicyRunConfig, sys.argv[1:])
    # Imported after config and files are validated: this imports torch and ray, which takes seconds.
    from rayrlhf.policy.driver import run_policy

    return run_policy(config)


if __name__ == "__main__":
    raise SystemExit(main())
