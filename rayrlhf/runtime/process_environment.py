"""The environment of a driver's process, which Ray and DeepSpeed read."""

from __future__ import annotations

import os
from pathlib import Path


def set_process_environment() -> None:
    """What a job's script calls first: transformers imports DeepSpeed, which looks for its accelerator then.

    What is set already stays. Ray reads its variables when it starts.
    """
    # Reports are polled; at the default interval each costs two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A run has more processes than a small machine has cores, and Ray would warn of it at every start.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # DeepSpeed would log that it has found no accelerator.
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
