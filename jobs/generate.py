"""Batch inference over a data set of prompts.

python jobs/generate.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(GenerateRunConfig, sys.argv[1:])
    # Imported after config and files are validated: this imports torch and ray, which takes seconds.
    from rayrlhf.inference.driver import run_generate

    return run_generate(config)


if __name__ == "__main__":
    raise SystemExit(main())
