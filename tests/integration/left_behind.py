"""Prints as JSON what of policy runs is alive on the cluster at RAY_ADDRESS: apps, placement groups,
actors.
"""

from __future__ import annotations

import faulthandler
import json
import logging
from typing import Any

import ray
from ray import serve
from ray.util import placement_group_table
from ray.util.state import list_actors

OURS = ("Board", "WeightStore", "Reaper", "EngineActor", "SlotController", "RayTrainWorker")


SECONDS = 20.0  # for one look; Ray's own calls have no deadline


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    listed: list[Any] = list(list_actors(limit=1000))
    actors = [actor.class_name for actor in listed if actor.state != "DEAD"]
    serving = "ServeController" in actors
    alive = {
        "apps": sorted(serve.status().applications) if serving else [],
        "groups": [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"],
        "actors": sorted(name for name in actors if name in OURS or name.startswith("ServeReplica")),
    }
    print(json.dumps(alive))


if __name__ == "__main__":
    main()
