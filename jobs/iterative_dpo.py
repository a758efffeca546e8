"""Rounds of generating, scoring, pairing best with worst, and DPO.

python jobs/iterative_dpo.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.chains import IterativeDpoConfig
from rayrlhf.loops.early import load_job


def main() -> int:
    config = load_job(IterativeDpoConfig, sys.argv[1:])
    # Only now that config and files are known to be good: these import torch and ray, which takes seconds.
    from rayrlhf.data.prompt_rows import prompt_columns
    from rayrlhf.loops.chain import run_chain
    from rayrlhf.loops.choose import best_and_worst

    return run_chain(config, lambda rows: best_and_worst(rows, prompt_columns(config.data), config.choose))


if __name__ == "__main__":
    raise SystemExit(main())
