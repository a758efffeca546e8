"""`python -m rayrlhf.commands.render.wait_for_nodes N`: wait for N nodes of the cluster at RAY_ADDRESS, or of
this node's cluster.
"""

from __future__ import annotations

import logging
import os
import sys
import time

import ray

TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 2.0
ADDRESS = os.environ.get("RAY_ADDRESS", "auto")


def main(words: list[str]) -> int:
    wanted = int(words[0])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    joined = -1
    while time.monotonic() < deadline:
        alive = _alive()
        if alive != joined:
            print(f"{alive} of {wanted} nodes have joined {ADDRESS}", flush=True)
            joined = alive
        if alive >= wanted:
            return 0
        time.sleep(POLL_SECONDS)
    print(f"only {joined} of {wanted} nodes joined within {TIMEOUT_SECONDS:g} s", file=sys.stderr)
    return 1


def _alive() -> int:
    """0 while the head does not answer yet."""
    if not ray.is_initialized():
        try:
            ray.init(address=ADDRESS, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            return 0
    return sum(bool(node["Alive"]) for node in ray.nodes())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
