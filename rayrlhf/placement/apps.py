"""What becomes of the applications on this cluster's Serve."""

from __future__ import annotations

from typing import Any

from ray.serve.context import _get_global_client


def app_statuses() -> dict[str, Any]:
    """Ray's `StatusOverview` of each application by name; empty where no Serve runs.

    Who polls asks for these: `serve.status` has every deployment described whole and pickled, which takes the
    controller and us a tenth of a second of CPU each time.
    """
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return {} if client is None else {found.name: found for found in client.list_serve_statuses()}
