"""Environment variables of the driver process for Ray and DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path


def set_process_environment() -> None:
    """Set the defaults; to be called first in a job's script. Variables that are already set are kept.

    Ray reads its variables when it starts. DeepSpeed, which transformers imports, selects its accelerator at
    import.
    """
    # Reports are polled; at the default interval each costs two seconds. Each poll takes controller and
    # worker some milliseconds of CPU.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A run has more processes than a small machine has cores; Ray would print a warning at every start.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # DeepSpeed would log that it has found no accelerator.
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
