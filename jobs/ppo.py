"""Online policy optimisation: python jobs/ppo.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]"""

from __future__ import annotations

import sys

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.launch import launch
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(PolicyRunConfig, sys.argv[1:])
    return launch("rayrlhf.policy.driver:run_policy", config)


if __name__ == "__main__":
    raise SystemExit(main())
