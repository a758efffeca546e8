"""What losses measure, as plain sums, and how the registry's losses are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayrlhf.algorithms.metrics import Max, Mean, Metrics
from rayrlhf.algorithms.registry import POLICY_LOSSES


def numbers(metrics: Metrics) -> list[Tensor]:
    """Every tensor in `metrics`."""
    found: list[Any] = []
    for metric in metrics.values():
        assert isinstance(metric, Mean | Max)
        found += [metric.value] if isinstance(metric, Max) else [metric.total, metric.weight]
    assert all(isinstance(number, Tensor) for number in found)
    return found


def totals(metrics: Metrics, num_tokens: float) -> dict[str, float]:
    """Means as sums over their `num_tokens` loss tokens, and maxima as they are."""
    found: dict[str, float] = {}
    for key, metric in metrics.items():
        assert isinstance(metric, Mean | Max), key
        if isinstance(metric, Mean):
            assert float(metric.weight) == num_tokens, f"{key} is not over the loss tokens"
        number = metric.value if isinstance(metric, Max) else metric.total
        assert not (isinstance(number, Tensor) and number.requires_grad), key
        found[key] = float(number)
    return found


def policy_loss(name: str, *columns: Tensor, **settings: Any) -> tuple[Tensor, Metrics]:
    """Loss and metrics of the loss called `name`, given those of `settings` that it reads."""
    entry = POLICY_LOSSES[name]
    read = {key: settings[key] for key in entry.reads if key in settings}
    return entry.function(*columns, **read, **entry.options)
