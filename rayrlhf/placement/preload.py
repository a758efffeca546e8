"""Processes of a local Ray that import the modules of a role before its actors are created.

Ray gives an actor a process that was started with the same runtime environment and has run nothing yet, if
there is one. Importing torch, transformers, DeepSpeed or vLLM takes a process five to fifteen seconds of CPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

ENABLED = "RAYRLHF_PRELOAD"  # environment variable of a driver that starts processes in advance
MODULE = "RAYRLHF_PRELOAD_MODULE"  # and of such a process
KEEP_SECONDS = 120  # a process that no actor has asked for until then may end
TOKENIZERS = "transformers.models.auto.tokenization_auto"


def preload() -> None:
    """Ray calls it when the process starts, as its setup hook."""
    import_module(os.environ[MODULE])


def preloading(module: str) -> dict[str, str]:
    """Environment variables of a process that imports the module when it starts; none in a driver that does
    not start processes in advance.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    if not is_enabled():
        return {}
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{preload.__name__}", MODULE: module}


def data_task_options() -> dict[str, Any]:
    """Options of Ray Data's tasks, so that they run in a process that has imported the tokenizers."""
    variables = preloading(TOKENIZERS)
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def is_enabled() -> bool:
    """Whether this process belongs to a job whose driver starts processes in advance."""
    return ENABLED in os.environ


def enable() -> bool:
    """Whether this driver starts processes in advance. Not where there are GPUs: modules look for them when
    they are imported, but a process gets its GPUs with its actor.
    """
    if Path("/dev/nvidiactl").exists():
        return False
    os.environ[ENABLED] = "1"
    return True


def prestart(variables: dict[str, str], count: int) -> None:
    """Start processes for actors with these environment variables on the only node of a local Ray. Returns at
    once; if Ray starts none, the actors start theirs.
    """
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.runtime_env import RuntimeEnv

    [node] = ray.nodes()
    messages: Any = node_manager_pb2  # these modules make their contents when they are imported
    common: Any = common_pb2
    request = messages.PrestartWorkersRequest(
        language=common.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEEP_SECONDS,
        num_workers=count,
    )
    runtime_env = RuntimeEnv(env_vars=variables) if variables else RuntimeEnv()
    request.runtime_env_info.serialized_runtime_env = runtime_env.serialize()
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    answer = NodeManagerServiceStub(channel).PrestartWorkers.future(request)
    answer.add_done_callback(lambda _: channel.close())
