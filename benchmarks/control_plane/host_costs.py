"""Unit costs that need no Ray: balancing, collectives over gloo, and stores of weight transfers."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayrlhf.data import packing
from rayrlhf.policy import batches
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks
from rayrlhf.weights.transfer_group import Receiver, TransferGroup, join
from rayrlhf.weights.transfer_store import TransferStore

GROUP_SIZE = 8
WORLD = 8
SAMPLE_TOKENS = 2048


def balancing(workers: int, num_samples: int) -> float:
    """Seconds of CPU of `balance_and_pack`'s balancing on one rank: shared prefixes, four mini-batches."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(7.0, 0.8, num_samples).astype(int) + 16, 16_384).tolist()
    prompts = generator.integers(64, 512, num_samples // GROUP_SIZE).tolist()
    per_rank = num_samples // workers

    def row(i: int) -> tuple[int, int, int, int]:
        group, index = divmod(i, GROUP_SIZE)
        return group, index, prompts[group] + lengths[i], prompts[group]

    tables = [
        np.array([row(i) for i in range(rank * per_rank, (rank + 1) * per_rank)]) for rank in range(workers)
    ]

    class First(Ranks):
        @property
        def rank(self) -> int:
            return 0

        @property
        def world_size(self) -> int:
            return workers

        def gather(self, items: list[Any]) -> list[Any]:
            assert np.array_equal(items[0], tables[0])
            return tables

        def exchange(self, outgoing: list[list[Any]]) -> list[Any]:
            return [item for items in outgoing for item in items]

    mine = [_sample(i, prompts[i // GROUP_SIZE], lengths[i]) for i in range(per_rank)]
    step = batches.Packing(4, num_samples, 32_768, 0, share_prefixes=True)
    start = time.process_time()
    batches._balance(mine, step, First(), 0)
    return time.process_time() - start


def _sample(number: int, prompt_tokens: int, tokens: int) -> Sample:
    group, index = divmod(number, GROUP_SIZE)
    return Sample(
        group_id=group,
        sample_index=index,
        prompt=Prompt(group, [7] * prompt_tokens, ""),
        response_ids=list(range(1000, 1000 + tokens)),
        response="",
        rollout_logprobs=[-0.1 * i for i in range(tokens)],
        loss_mask=[1] * tokens,
        policy_versions=[3] * tokens,
        truncated=False,
        score=1.0,
    )


def differencing_per_sum() -> float:
    """Seconds per item and part of Karmarkar and Karp's method, at 8,192 items and 64 parts."""
    lengths = np.random.default_rng(0).integers(64, 16_384, 8192).tolist()
    start = time.process_time()
    limit, packing.MOST_MERGED_SUMS = packing.MOST_MERGED_SUMS, 2**62
    packing.balanced_partition(lengths, 64)
    packing.MOST_MERGED_SUMS = limit
    return (time.process_time() - start) / (8192 * 64)


def pickled_sample() -> float:
    """Seconds to pickle and unpickle a sample of 2,048 tokens."""
    sample = batches._without_text(_sample(0, 256, SAMPLE_TOKENS))
    start = time.process_time()
    for _ in range(50):
        pickle.loads(pickle.dumps([sample]))
    return (time.process_time() - start) / 50


def collectives() -> dict[str, float]:
    """Seconds of CPU on one of eight ranks per hop of gloo's rings and per round of swaps in pairs."""
    context = get_context("spawn")
    with context.Pool(WORLD) as pool:
        port = 20_000 + os.getpid() % 10_000
        found = pool.starmap(_rank, [(rank, port) for rank in range(WORLD)], chunksize=1)
    mean = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    return {
        "ring_hop": mean["all_reduce"] / (2 * (WORLD - 1)),
        "ring_gather_hop": mean["all_gather_object"] / (2 * (WORLD - 1)),
        "swap_round": mean["sum_numbers"] / 3,
        "gather_round": mean["gather"] / 3,
    }


def _rank(rank: int, port: int) -> dict[str, float]:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD, timeout=timedelta(120))
    ranks, values = Ranks(), torch.ones(10, dtype=torch.float64)
    numbers = {f"{i}": 1.0 for i in range(10)}
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(values.clone()),
        "all_gather_object": lambda: dist.all_gather_object([None] * WORLD, [1, 2, 3]),
        "sum_numbers": lambda: ranks.sum_numbers(numbers),
        "gather": lambda: ranks.gather([1, 2, 3]),
    }
    found: dict[str, float] = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        dist.barrier()
        start = time.process_time()
        for _ in range(40):
            call()
        found[name] = (time.process_time() - start) / 40
        dist.barrier()
    dist.destroy_process_group()
    return found


def transfer_store(devices: int = 32, buckets: int = 40) -> float:
    """Seconds of CPU in the process of the transfer store per bucket and device: a trainer and an engine on
    each device, with IPC links through shared memory; all of them in another process.
    """
    store = TransferStore()
    receivers = {replica: Receiver(replica, (f"device {replica}",)) for replica in range(devices)}
    group = TransferGroup("ipc", store.address, receivers, 120.0)
    with get_context("spawn").Pool(1) as pool:
        pool.apply(_push, (group, 1))  # imports
        start = time.process_time()
        pool.apply(_push, (group, buckets))
        spent = time.process_time() - start
    store.close()
    return spent / (devices * buckets)


def _push(group: TransferGroup, buckets: int) -> None:
    cpu = torch.device("cpu")

    def send(device: str) -> None:
        link = join(group, rank=0, device=cpu, key=device)
        for _ in range(buckets):
            link.send(link.buffer(1024))
        link.flush()

    def receive(replica: int) -> None:
        key = group.receivers[replica].devices[0]
        link = join(group, rank=group.first_rank(replica), device=cpu, key=key)
        for _ in range(buckets):
            link.receive(1024)
            link.release()

    with ThreadPoolExecutor(2 * len(group.receivers)) as pool:
        done = [pool.submit(send, receiver.devices[0]) for receiver in group.receivers.values()]
        done += [pool.submit(receive, replica) for replica in group.receivers]
        for each in done:
            each.result()


def tcp_store() -> float:
    """Seconds of CPU in the process of torch's TCPStore per request of a client in another process."""
    torch_store: Any = dist
    store = torch_store.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with get_context("spawn").Pool(1) as pool:
        pool.apply(_poll, (store.port, 10))
        start = time.process_time()
        pool.apply(_poll, (store.port, 20_000))
        return (time.process_time() - start) / 20_000


def _poll(port: int, times: int) -> None:
    torch_store: Any = dist
    client = torch_store.TCPStore("127.0.0.1", port, is_master=False)
    for _ in range(times):
        client.check(["bucket/17"])


def measure() -> dict[str, float]:
    found = {f"balancing_{w}": balancing(w, 128 * w) for w in (8, 64, 512)}
    found |= {"differencing_per_sum": differencing_per_sum(), "pickled_sample": pickled_sample()}
    found |= collectives()
    return found | {"transfer_store_bucket": transfer_store(), "tcp_store_request": tcp_store()}


if __name__ == "__main__":
    import json

    print(json.dumps(measure()), file=sys.stdout)
