"""A job file for `anyscale job submit -f job.yaml`, its compute config within it."""

from __future__ import annotations

from typing import Any

from rayrlhf.commands.render.rendering import EXCLUDED, Rendering, commented, to_yaml

WAIT_FOR_NODES = "python -m rayrlhf.commands.render.wait_for_nodes"


def render_anyscale(job: Rendering) -> str:
    notes = ["anyscale job submit -f this.yaml, in the root of the repository."]
    if job.secrets:
        names = ", ".join(f"{name} ({secret})" for name, (secret, _) in job.secrets.items())
        notes.append(
            f"A job file has no place for secrets: give the cloud {names}, so that the nodes have them."
        )
    return commented([*job.header(), *notes]) + to_yaml(anyscale_job(job))


def anyscale_job(job: Rendering) -> dict[str, Any]:
    launch, anyscale = job.config.launch, job.config.launch.anyscale
    overrides = job.run_dir(anyscale.storage)
    described: dict[str, Any] = {
        "name": job.name,
        # The entrypoint starts with the head, before the workers have joined.
        "entrypoint": f"{WAIT_FOR_NODES} {job.nodes.count + 1} && {' '.join([job.command, *overrides])}",
        "image_uri": launch.image,
        "working_dir": ".",
        "excludes": [pattern.strip("/") for pattern in EXCLUDED],
        "max_retries": anyscale.max_retries,
        "compute_config": {
            # The driver only: no slot may be placed there.
            "head_node": {"instance_type": anyscale.head_instance, "resources": {"CPU": 0, "GPU": 0}},
            "worker_nodes": [
                {
                    "name": "workers",
                    "instance_type": anyscale.worker_instance,
                    "min_nodes": job.nodes.count,
                    "max_nodes": job.nodes.count,
                    "market_type": anyscale.market,
                }
            ],
        },
    }
    if job.env:
        described["env_vars"] = job.env
    if anyscale.timeout_seconds is not None:
        described["timeout_s"] = anyscale.timeout_seconds
    if anyscale.tags:
        described["tags"] = anyscale.tags
    return described
