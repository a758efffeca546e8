"""Routing decisions of a CPU engine, for router replay.

On GPUs vLLM returns them by itself (`enable_return_routed_experts`), with its second model runner, which
needs Triton. On a CPU they are recorded here: vLLM's routers report the experts of each row of a step, and
rows are the scheduled tokens of the batch's requests, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

UNKNOWN = -1


class RouteRecorder:
    """Records the experts of every token of running requests, in one worker.

    A request that finds its prefix in the cache was not routed there: the decisions are kept by cache slot,
    too, as long as the slot is not computed again.
    """

    def __init__(self, runner: Any) -> None:
        """`runner`: the worker's model runner."""
        self.runner = runner
        self.step: dict[int, Tensor] = {}  # by layer index: [rows, K] of the current step
        self.routes: dict[str, list[tuple[int, np.ndarray]]] = {}  # by request: first token, [tokens, L, K]
        self.by_slot: np.ndarray | None = None  # [slots of the key-value cache, L, K] int16
        self.layer_ids = moe_layers_of(runner.model)
        for module in runner.model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self.step.__setitem__, module.layer_id))
        runner.execute_model = self._recorded(runner.execute_model)

    def take(self, request_id: str) -> np.ndarray | None:
        """The experts [tokens, L, K] (int16) of a finished request, which is then forgotten."""
        names = [name for name in self.routes if name.startswith(f"{request_id}-")]  # vLLM adds a suffix
        if not names:
            return None
        pieces = self.routes.pop(names[0])
        size = max(start + len(rows) for start, rows in pieces)
        taken = np.full((size, *pieces[0][1].shape[1:]), UNKNOWN, dtype=np.int16)
        for start, rows in pieces:  # later ones were computed again, after a pause
            taken[start : start + len(rows)] = rows
        return taken

    def _recorded(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.step.clear()
            result = execute(scheduler_output, *args, **kwargs)
            if self.step:
                self._keep(scheduler_output.num_scheduled_tokens)
            return result

        return execute_model

    def _keep(self, num_scheduled: dict[str, int]) -> None:
        batch = self.runner.input_batch
        layers = torch.stack([self.step[layer] for layer in self.layer_ids], 1)  # [rows, L, K]
        rows = layers.to(torch.int16).numpy()
        first = 0
        for index, request_id in enumerate(batch.req_ids):
            count = num_scheduled.get(request_id, 0)
            if count == 0:
                continue
            start = int(batch.num_computed_tokens_cpu[index])
            own, by_slot = rows[first : first + count], self._by_slot(rows.shape[1:])
            if request_id not in self.routes:
                self.routes[request_id] = [(0, by_slot[self._slots(batch, index, range(start))])]
            self.routes[request_id].append((start, own))
            by_slot[self._slots(batch, index, range(start, start + count))] = own
            first += count

    def _by_slot(self, shape: tuple[int, ...]) -> np.ndarray:
        if self.by_slot is None:
            cache = self.runner.kv_cache_config
            size = cache.num_blocks * self._block_tokens()
            self.by_slot = np.full((size, *shape), UNKNOWN, dtype=np.int16)
        return self.by_slot

    def _block_tokens(self) -> int:
        return self.runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size

    def _slots(self, batch: Any, index: int, tokens: range) -> np.ndarray:
        """Cache slots of some tokens of a request."""
        blocks = batch.block_table[0].get_numpy_array()[index]
        numbers, size = np.arange(tokens.start, tokens.stop), self._block_tokens()
        return blocks[numbers // size] * size + numbers % size


def moe_layers_of(model: nn.Module) -> list[int]:
    """Numbers of the layers with experts, in order. Raises `ValueError` if there are none."""
    found = sorted(module.layer_id for module in model.modules() if isinstance(module, MoERunner))
    if not found:
        raise ValueError("rollout.router_replay is set, but vLLM's form of this model has no experts")
    return found


def every_token(routes: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """Routes [num_tokens, L, K] (int16): the last token was sampled, but not routed."""
    if routes is None:
        raise ValueError("the engine returned no routing decisions for a request")
    complete = np.full((num_tokens, *routes.shape[1:]), UNKNOWN, dtype=np.int16)
    known = min(num_tokens, len(routes))
    complete[:known] = routes[:known]
    return complete
