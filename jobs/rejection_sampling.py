"""Best of n by a reward, then supervised fine-tuning on the chosen responses.

python jobs/rejection_sampling.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.chains import RejectionSamplingConfig
from rayrlhf.loops.early import load_job


def main() -> int:
    config = load_job(RejectionSamplingConfig, sys.argv[1:])
    # Only now that config and files are known to be good: these import torch and ray, which takes seconds.
    from rayrlhf.data.prompt_rows import prompt_columns
    from rayrlhf.loops.chain import run_chain
    from rayrlhf.loops.choose import best_of_n

    return run_chain(config, lambda rows: best_of_n(rows, prompt_columns(config.data), config.choose))


if __name__ == "__main__":
    raise SystemExit(main())
