"""Best of n by a reward, then supervised fine-tuning on the chosen responses.

python jobs/rejection_sampling.py CONFIG.yaml [OTHER.yaml ...] [key.path=value ...]
"""

from __future__ import annotations

import sys

from rayrlhf.config.chains import RejectionSamplingConfig
from rayrlhf.runtime.file_checks import load_job
from rayrlhf.runtime.process_environment import set_process_environment


def main() -> int:
    set_process_environment()
    config = load_job(RejectionSamplingConfig, sys.argv[1:])
    # Imported after config and files are validated: these import torch and ray, which takes seconds.
    from rayrlhf.data.rows.prompt_rows import prompt_columns
    from rayrlhf.inference.rounds import run_chain
    from rayrlhf.inference.select import best_of_n

    return run_chain(config, lambda rows: best_of_n(rows, prompt_columns(config.data), config.choose))


if __name__ == "__main__":
    raise SystemExit(main())
