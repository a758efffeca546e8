"""The control flow of GPUs on a machine without one, and a ledger of the memory that every role takes.

With the variable RAYRLHF_PRETEND_GPU (JSON of `Settings`) and `site/` on PYTHONPATH, every process of a
cluster pretends: its counted GPUs have UUIDs and a size, vLLM's engine is one that starts slowly and has no
model, and trainers, engines and served models report what they take and give back.

The start is put into the order that is hardest for the turns (`install`): engines come while the reference
loads, and the reward model and the trainers while all engines measure their memory, however long the
processes take to get there.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "RAYRLHF_PRETEND_GPU"
REPOSITORY = Path(__file__).parents[3]
GIB = 2**30

# Chosen so that everything fits in its turn, and no two turns fit at once.
CAPACITY = 80 * GIB
ENGINE_CONTEXT = 2 * GIB  # which a sleeping engine keeps
ENGINE_WEIGHTS = 16 * GIB
TRAINER_WEIGHTS = 16 * GIB
TRAINER_STATES = 38 * GIB  # optimizer states and gradients
PUSH_BUFFERS = 24 * GIB  # buckets and gathered weights, in the allocator's cache
SERVED_MODEL = 8 * GIB  # a reward model, or a reference


@dataclass(frozen=True)
class Settings:
    folder: str  # of the ledger
    num_engines: int
    engine_share: float = 0.5  # of the capacity: weights and cache
    start_seconds: float = 5.0  # of an engine, at least
    load_seconds: float = 2.0  # of any other model, at least
    linger_seconds: float = (
        5.0  # that a load or a start goes on after the last of those it waits for has come
    )
    patience_seconds: float = 240.0  # with those
    request_seconds: float = 2.0

    @property
    def engine_cache(self) -> int:
        return int(CAPACITY * self.engine_share) - ENGINE_WEIGHTS

    @property
    def endless(self) -> Path:
        """Requests that run while this file exists never end by themselves."""
        return Path(self.folder) / "endless"

    def environment(self) -> dict[str, str]:
        """Variables of a cluster and its driver that pretend."""
        site = Path(__file__).parent / "site"
        path = os.pathsep.join([str(site), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": path}


def settings() -> Settings:
    return Settings(**json.loads(os.environ[VARIABLE]))
