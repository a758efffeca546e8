"""Status of the applications on this cluster's Serve, and of their replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client


def app_statuses() -> dict[str, Any]:
    """Ray's `StatusOverview` of each application by name; empty if Serve is not running.

    For polling: `serve.status` pickles a full description of every deployment, which takes a tenth of a
    second of CPU in the controller and in the caller each time.
    """
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return {} if client is None else {status.name: status for status in client.list_serve_statuses()}


def failed_starts(num_replicas: int) -> int:
    """Failed starts until Serve gives a deployment up (`max_constructor_retry_count`). It counts those of all
    replicas together: of eight engines, two that fail once each must not end a run.
    """
    return 2 * num_replicas


def health_check_period(num_replicas: int, least: float = 2.0) -> float:
    """Seconds between health checks of a replica: Serve's one controller makes all of them, 50 per second."""
    return max(least, num_replicas / 50)


def of_this_replica(log: Path | None) -> Path | None:
    """Log file of this replica: rank 0 writes to `log`, rank 1 to `<stem>-1.log`, and so on."""
    if log is None:
        return None
    rank = serve.get_replica_context().rank.rank
    return log.with_stem(f"{log.stem}-{rank}") if rank else log
