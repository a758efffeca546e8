"""KTO from single responses with a label each.

Usage: python jobs/kto.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.supervised import KtoRunConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.launch import launch
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(KtoRunConfig, sys.argv[1:])
    return launch("rayrlhf.supervised.driver:run_supervised", config)


if __name__ == "__main__":
    raise SystemExit(main())
