"""What becomes of the applications on this cluster's Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client


def app_statuses() -> dict[str, Any]:
    """Ray's `StatusOverview` of each application by name; empty where no Serve runs.

    Who polls asks for these: `serve.status` has every deployment described whole and pickled, which takes the
    controller and us a tenth of a second of CPU each time.
    """
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return {} if client is None else {found.name: found for found in client.list_serve_statuses()}


def of_this_replica(log: Path | None) -> Path | None:
    """Replicas write files of their own: the first into `log`, the next into `<stem>-1.log`."""
    if log is None:
        return None
    rank = serve.get_replica_context().rank.rank
    return log.with_stem(f"{log.stem}-{rank}") if rank else log
