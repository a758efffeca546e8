"""Processes of a local Ray that import the modules of a role before its actors are created.

Ray gives an actor a process that was started with the same runtime environment and has run nothing yet, if
there is one. Importing torch, transformers, DeepSpeed or vLLM takes a process five to fifteen seconds of CPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

MODULE = "RAYRLHF_PRELOAD"  # environment variable of such a process
KEEP_SECONDS = 120  # a process that no actor has asked for until then may end


def preload() -> None:
    """Ray calls it when the process starts, as its setup hook."""
    import_module(os.environ[MODULE])


def preloading(module: str) -> dict[str, str]:
    """Environment variables of a process that imports the module when it starts.

    None on a cluster, where nothing is started in advance, and none where there are GPUs: modules look for
    theirs when they are imported, but a process gets them with its actor.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    on_cluster = os.environ.get("RAY_ADDRESS") not in (None, "", "local")
    if on_cluster or Path("/dev/nvidiactl").exists():
        return {}
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{preload.__name__}", MODULE: module}


def prestart(variables: dict[str, str], count: int) -> None:
    """Start processes for actors with these environment variables on the only node of a local Ray. Returns at
    once; if Ray starts none, the actors start theirs.
    """
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.runtime_env import RuntimeEnv

    [node] = ray.nodes()
    request = PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEEP_SECONDS,
        num_workers=min(count, os.cpu_count() or 1),
    )
    request.runtime_env_info.serialized_runtime_env = RuntimeEnv(env_vars=variables).serialize()
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    answer = NodeManagerServiceStub(channel).PrestartWorkers.future(request)
    answer.add_done_callback(lambda _: channel.close())
