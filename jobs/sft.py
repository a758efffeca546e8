"""Supervised fine-tuning and continued pretraining.

Usage: python jobs/sft.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.supervised import SftRunConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.launch import launch
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(SftRunConfig, sys.argv[1:])
    return launch("rayrlhf.supervised.driver:run_supervised", config)


if __name__ == "__main__":
    raise SystemExit(main())
