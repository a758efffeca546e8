"""vLLM's in-process engine, stepped by one thread, with an asyncio interface.

The engine runs in the process of its actor: one failure domain, no process that can be orphaned, and weight
buckets are read directly from the object store instead of being copied through a socket.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from rayrlhf.data.images import image_reader
from rayrlhf.hub.local import local_folder
from rayrlhf.rollout.failures import EngineAsleep, EngineDied
from rayrlhf.rollout.process_groups import groups_of_one_rank_are_shared
from rayrlhf.rollout.vllm_adapter import switch_scheduled
from rayrlhf.rollout.vllm_images import ENGINE_ARGS, check_expanded, prompt_with, replace_torchvision
from rayrlhf.rollout.vllm_outputs import flat, leave_out_token_texts
from rayrlhf.rollout.vllm_routes import every_token
from rayrlhf.rollout.vllm_worker import BUCKETS
from rayrlhf.samples import EncodedImage
from rayrlhf.weights.store import AdapterSpec, TensorSlice
from rayrlhf.weights.transfer_group import TransferGroup

Result = TypeVar("Result")


class Stepper:
    """All calls into the engine run on its thread; callers await the result."""

    def __init__(
        self, engine_args: dict[str, Any], *, router_replay: bool = False, keeps_cache: bool = False
    ) -> None:
        """Built by the thread that steps it. Each thread that computes with OpenMP has a team of others; with
        a second team in the process, libgomp counts more threads than cores, and its workers sleep after each
        parallel region instead of spinning until the next. A rollout of 2,048 tokens on two cores took 18 s
        with two teams and 13 to 15 s with one.

        Args:
            router_replay: outputs have the experts of each token, in the layers that have experts.
            keeps_cache: requests that run while weights are loaded go on with the keys and values that the
                old weights computed; new ones share none of these. Not of models with vision.
        """
        self._commands: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._waiting: dict[str, Future[RequestOutput]] = {}
        self._paused = False
        self._keeps_cache = keeps_cache
        self._num_updates = 0  # of the weights, or of the adapter
        self._adapter: LoRARequest | None = None  # of all requests; None: the base model alone
        self._num_adapters = 0
        self._failure: BaseException | None = None
        built: Future[None] = Future()
        build = partial(self._build, engine_args, router_replay=router_replay)
        threading.Thread(target=self._run, args=(build, built), daemon=True, name="vllm-step").start()
        built.result()

    def _build(self, engine_args: dict[str, Any], *, router_replay: bool) -> None:
        folder = local_folder(engine_args["model"])
        vision = image_reader(folder, engine_args.get("trust_remote_code", False), 0.0)
        self._image_token_id = None if vision is None else vision.image_token_id
        if vision is not None:
            self._keeps_cache = False  # running requests may still need images that old weights encoded
            replace_torchvision()
            engine_args = ENGINE_ARGS | engine_args
        arguments = EngineArgs(
            **{**engine_args, "model": folder},
            worker_extension_cls="rayrlhf.rollout.vllm_worker.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=BUCKETS),
        )
        leave_out_token_texts()
        with groups_of_one_rank_are_shared():
            self._engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        self._moe_layers: list[int] = self._engine.collective_rpc("moe_layers")[0] if router_replay else []

    async def stream(
        self,
        prompt_ids: list[int],
        sampling: list[dict[str, Any]],
        images: Sequence[EncodedImage] = (),
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield (index, finished output) per entry of `sampling`, all for one prompt, as they finish.

        Leaving the iteration early aborts what is still running.
        """

        def enqueue() -> dict[str, Future[RequestOutput]]:
            prompt = self._prompt(prompt_ids, images)
            return dict(self._enqueue(prompt, flat(params)) for params in sampling)

        futures = await self._on_thread(enqueue)
        waiting = {asyncio.wrap_future(future): index for index, future in enumerate(futures.values())}
        try:
            while waiting:
                finished, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in sorted(finished, key=waiting.__getitem__):
                    output = future.result()
                    if images:
                        check_expanded(output.prompt_token_ids, prompt_ids)
                    yield waiting.pop(future), output
        finally:
            unfinished = [request_id for request_id, future in futures.items() if not future.done()]
            if unfinished and self._failure is None:
                self._commands.put((lambda: self._abort(unfinished), Future()))

    async def pause(self) -> None:
        """Stop stepping for an update of the weights. Running requests keep their tokens and, with
        `keeps_cache`, what the old weights computed of them.
        """

        def stop() -> None:
            self._paused = True
            self._num_updates += 1
            if not self._keeps_cache:
                self._reset_caches()

        await self._on_thread(stop)

    def _reset_caches(self) -> None:
        """Remove what was computed with the weights: keys and values of tokens, and encoded images."""
        self._engine.reset_prefix_cache(reset_running_requests=True)
        if self._image_token_id is not None:
            self._engine.reset_encoder_cache()

    async def resume(self) -> None:
        def go() -> None:
            self._paused = False

        await self._on_thread(go)

    async def release_memory(self) -> int:
        """Stop stepping, fail running requests with `EngineAsleep`, and free weights and cache; returns the
        freed bytes.
        """

        def release() -> list[int]:
            self._paused = True
            self._fail_waiting(EngineAsleep("the engine was put to sleep: it is the trainers' turn"))
            self._reset_caches()
            return self._engine.collective_rpc("release_memory")

        return sum(await self._on_thread(release))

    async def reacquire_memory(self, part: str) -> None:
        """Reacquire `weights` (which must then be loaded) or `kv_cache`; `resume` continues stepping."""
        await self._rpc("reacquire_memory", part=part)

    async def device_keys(self) -> list[str]:
        """Device key of each worker."""
        return await self._rpc("device_key")

    async def join(self, transfer_group: TransferGroup, first_rank: int) -> None:
        """Join a transfer group. Raises `TransferFailed`."""
        init_info = {"transfer_group": transfer_group, "first_rank": first_rank}
        await self._rpc("init_weight_transfer_engine", init_info=init_info)

    async def leave(self) -> None:
        await self._rpc("leave_transfer_group")

    async def start_weight_update(self, *, verify: bool = False) -> None:
        """`verify`: `differences` compares this update with the trainer's checksums."""
        await self._rpc("record_arrivals", verify=verify)
        await self._rpc("start_weight_update")

    async def differences(self, checksums: dict[str, int]) -> dict[str, str]:
        """What is wrong with the weights of the last update, by name; empty if nothing is."""
        answers = await self._rpc("differences", checksums=checksums)
        return {name: why for answer in answers for name, why in answer.items()}

    async def load_bucket(self, slices: Sequence[TensorSlice], bucket: Any = None) -> None:
        """
        Args:
            bucket: uint8 array of its bytes; None: receive them over the transfer group's link.
        """
        await self._rpc("update_weights", update_info={"slices": slices, "bucket": bucket})

    async def finish_weight_update(self, version: int) -> None:
        await self._rpc("finish_weight_update")
        await self._on_thread(lambda: self._engine.set_weight_version(str(version)))

    async def start_adapter_update(self) -> None:
        await self._rpc("start_adapter_update")

    async def load_adapter_bucket(self, slices: Sequence[TensorSlice], bucket: Any = None) -> None:
        """Like `load_bucket`, of an adapter's tensors."""
        await self._rpc("update_adapter", slices=slices, bucket=bucket)

    async def finish_adapter_update(self, version: int, spec: AdapterSpec) -> None:
        """Replace the adapter of running and future requests. Raises `RuntimeError` if the engine's tensors
        are not the trainer's.
        """
        self._num_adapters += 1
        # vLLM never opens the path: the adapter is in memory under this id before a request names it.
        name = f"version {version}, adapter {self._num_adapters}"
        request = LoRARequest(lora_name=name, lora_int_id=self._num_adapters, lora_path=name)
        await self._rpc("finish_adapter_update", request=request, spec=spec)

        def switch() -> None:
            switch_scheduled(self._engine, request)
            self._adapter = request
            self._engine.set_weight_version(str(version))

        await self._on_thread(switch)

    def raise_if_dead(self) -> None:
        if self._failure is not None:
            raise EngineDied(f"{type(self._failure).__name__}: {self._failure}") from self._failure

    async def _rpc(self, method: str, **kwargs: Any) -> list[Any]:
        return await self._on_thread(lambda: self._engine.collective_rpc(method, None, (), kwargs))

    async def _on_thread(self, call: Callable[[], Result]) -> Result:
        self.raise_if_dead()
        future: Future[Result] = Future()
        self._commands.put((call, future))
        return await asyncio.wrap_future(future)

    def _prompt(self, prompt_ids: list[int], images: Sequence[EncodedImage]) -> dict[str, Any]:
        if not images:
            prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
            if self._keeps_cache:  # prefixes that other weights computed have another salt
                prompt["cache_salt"] = f"{self._num_updates}"
            return prompt
        if self._image_token_id is None:
            raise ValueError("the engine's model has no vision, but the prompt has images")
        return prompt_with(prompt_ids, images, self._image_token_id)

    def _enqueue(self, prompt: dict[str, Any], params: SamplingParams) -> tuple[str, Future[RequestOutput]]:
        request_id = uuid.uuid4().hex
        params.output_kind = RequestOutputKind.FINAL_ONLY
        future: Future[RequestOutput] = Future()
        self._waiting[request_id] = future
        given: Any = prompt  # one of vLLM's typed dictionaries
        self._engine.add_request(request_id, given, params, lora_request=self._adapter)
        return request_id, future

    def _fail_waiting(self, error: Exception) -> None:
        waiting = dict(self._waiting)
        self._abort(list(waiting))
        for future in waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _abort(self, request_ids: list[str]) -> None:
        aborted = [i for i in request_ids if self._waiting.pop(i, None) is not None]
        self._engine.abort_request(aborted)
        if self._moe_layers:
            for request_id in aborted:
                self._engine.collective_rpc("take_routes", None, (request_id,))

    def _add_routes(self, output: RequestOutput) -> None:
        """Bring a finished output's `routed_experts` into the form of `Generation`."""
        [completion], prompt_ids = output.outputs, output.prompt_token_ids or []
        routes = completion.routed_experts  # of all layers, if the engine returns them by itself
        if routes is None:
            routes = self._engine.collective_rpc("take_routes", None, (output.request_id,))[0]
        else:
            routes = routes[:, self._moe_layers]
        completion.routed_experts = every_token(routes, len(prompt_ids) + len(completion.token_ids))

    def _run(self, build: Callable[[], None], built: Future[None]) -> None:
        try:
            build()
        except BaseException as failure:
            built.set_exception(failure)
            return
        built.set_result(None)
        try:
            while True:
                self._run_commands()
                for output in self._engine.step():
                    if isinstance(output, RequestOutput) and output.finished:
                        future = self._waiting.pop(output.request_id)
                        if self._moe_layers:
                            self._add_routes(output)
                        if future.set_running_or_notify_cancel():
                            future.set_result(output)
        except BaseException as failure:
            # The engine cannot continue after any failure: fail all waiting requests and the health check.
            self._failure = failure
            for future in self._waiting.values():
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineDied(f"{type(failure).__name__}: {failure}"))

    def _run_commands(self) -> None:
        """Run queued calls; return only when there is something to step."""
        while True:
            busy = not self._paused and self._engine.has_unfinished_requests()
            try:
                call, future = self._commands.get(block=not busy)
            except queue.Empty:
                return
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
