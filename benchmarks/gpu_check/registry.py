"""The steps in their order: what is least certain comes first, since the time on a GPU may end."""

from __future__ import annotations

from benchmarks.gpu_check.runner import Step

STEPS_FOLDER = "benchmarks.gpu_check.steps"


def _step(name: str, function: str, seconds: float, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, f"{STEPS_FOLDER}.{function}", seconds, needs)


# Deadlines are for a GPU; most steps take a third. rayrlhf's configs need pydantic, its transfers pyzmq.
STEPS = (
    _step("environment", "environment:run", 60),
    _step("attention", "attention:kernels", 90),
    _step("ipc_handles", "ipc:handles", 120),
    _step("ipc_link", "ipc_link:run", 90, ("zmq",)),
    _step("cumem", "cumem:run", 120),
    _step("contention", "contention:run", 90),
    _step("host_copies", "host_copies:run", 60),
    _step("zero2", "zero:run_2", 150, ("deepspeed", "pydantic")),
    _step("zero3", "zero:run_3", 150, ("deepspeed", "pydantic")),
    _step("update_1b", "update:run_1b", 150, ("pydantic",)),
    _step("update_8b", "update:run_8b", 180, ("pydantic",)),
    _step("fused_head", "head:run", 90),
    _step("process_group", "process_group:run", 60, ("zmq",)),
    _step("packed_model", "attention:packed_model", 60),
    _step("engine", "engine:run", 300, ("vllm", "ray", "pydantic", "zmq")),
    _step("ppo", "ppo:run", 400, ("vllm", "ray", "deepspeed", "pydantic", "zmq")),
)
