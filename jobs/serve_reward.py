"""A reward server over HTTP: python jobs/serve_reward.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]"""

from __future__ import annotations

import sys

from rayrlhf.config.load import load_or_exit
from rayrlhf.config.serve_reward import ServeRewardConfig


def main() -> int:
    config = load_or_exit(ServeRewardConfig, sys.argv[1:])
    # Only now that the config is known to be good: this imports torch and ray, which takes seconds.
    from rayrlhf.loops.serve_reward import serve_reward

    return serve_reward(config)


if __name__ == "__main__":
    raise SystemExit(main())
