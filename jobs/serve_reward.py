"""A reward server over HTTP: python jobs/serve_reward.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]"""

from __future__ import annotations

import sys

from rayrlhf.config.serve_reward import ServeRewardConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(ServeRewardConfig, sys.argv[1:])
    # Imported after config and files are validated: this imports torch and ray, which takes seconds.
    from rayrlhf.reward_server.driver import serve_reward

    return serve_reward(config)


if __name__ == "__main__":
    raise SystemExit(main())
