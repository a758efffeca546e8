"""What the driver fills in once it knows the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.placement.plan import plan_placement
from rayrlhf.runtime.run import fitted
from tests.integration.policy_runs import tiny_run


class Lines:
    """Stands for the console."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_deadlines_follow_from_the_responses(tiny_model: str, tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        tiny_model,
        rollout={
            "prompts_per_step": 64,
            "max_concurrent_requests": 8,
            "sampling": {"max_new_tokens": 1000},
            "kv_cache_bytes": 2**30,
        },
        train={"max_tokens_per_micro_batch": 2000},
    )
    console: Any = Lines()
    found = fitted(config, plan_placement, console)
    # 8 rounds of 1,000 tokens at 0.3 s on a CPU, and two minutes more.
    assert found.rollout.timeout_seconds == 2400
    assert found.train.collective_timeout_seconds == 2520
    assert any(line.startswith("rollout.timeout_seconds=2400, as it is not set") for line in console.lines)
