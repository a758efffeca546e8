"""What the engine reports of its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.rollout.engine import _generation, _version, rollout_deployment


def test_versions_are_vllms_labels() -> None:
    assert [_version(label) for label in ("default", "0", "12")] == [0, 0, 12]
    with pytest.raises(ValueError, match="the engine's weights have the version 'v2'"):
        _version("v2")


def test_a_deployment_allows_for_each_of_its_engines() -> None:
    nothing: Any = None
    app: Any = rollout_deployment(nothing, nothing, num_engines=8, max_requests=4)
    options = app._bound_deployment._deployment_config
    assert options.max_constructor_retry_count == 16, "Serve counts the failures of all engines together"
    assert options.health_check_period_s == 2.0
    assert options.max_ongoing_requests == 8, "four are computed, and four wait where they are needed next"


def test_every_token_has_a_logprob() -> None:
    output = SimpleNamespace(
        token_ids=[5, 6],
        logprobs=SimpleNamespace(logprobs=[-0.5]),
        text="",
        finish_reason="stop",
        weight_versions=[],
        routed_experts=None,
    )
    with pytest.raises(ValueError, match="1 log-probabilities of 2 tokens"):
        _generation(SimpleNamespace(outputs=[output]))
    output.logprobs.logprobs.append(-0.25)
    assert _generation(SimpleNamespace(outputs=[output])).logprobs == [-0.5, -0.25]


def test_health_checks_of_many_engines_leave_the_controller_time() -> None:
    nothing: Any = None
    app: Any = rollout_deployment(nothing, nothing, num_engines=512, max_requests=4)
    assert app._bound_deployment._deployment_config.health_check_period_s == pytest.approx(10.24)
