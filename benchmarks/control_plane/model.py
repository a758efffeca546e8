"""Seconds of control plane per step, computed from unit costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rayrlhf.placement.memory_turns import RENEW_SECONDS, renewal_seconds
from rayrlhf.placement.serve_status import health_check_period
from rayrlhf.placement.slot_controller import poll_interval
from rayrlhf.weights.direct import LIVENESS_SECONDS, RECEIVERS_PER_SECOND

STEP_SECONDS = 60.0
TARGET = 0.02  # of a step
SAMPLES_PER_WORKER = 128
GROUP_SIZE = 8
SOURCES = 2
NODE = 8  # GPUs of a node, each with a trainer and an engine
BUCKETS = 120  # of 128 MiB: 8B weights in bf16
PUSH_SECONDS = 5.0
HOP_SECONDS = 30e-6  # of a message between two nodes, in addition to the processes' own time
BROADCASTS = 4  # to all engines per step without a push's layout: sleep, wake twice, describe
STORE_CALLS = (
    7,
    5,
)  # of an engine per step: asleep, awake twice, loaded, and where its lease is moved on its own
REPORTS = 12  # of a step: phases, metrics, rollouts
PARTS = 8  # micro-batches of a worker
CALLS, CALLS_WITH_PARTS = 7, 5  # to a separate critic: values, four updates, offload, reload
SIZES = (8, 64, 512)

Units = Mapping[str, float]


class Row(NamedTuple):
    """Seconds per step: of the step itself, and of CPU in one process; before and after."""

    what: str
    process: str
    critical: tuple[float, float]
    cpu: tuple[float, float]
    in_total: bool = True


def pair(values: Iterable[float]) -> tuple[float, float]:
    before, after = values
    return before, after


def same(value: float) -> tuple[float, float]:
    return value, value


def rows(w: int, u: Units) -> list[Row]:
    """`w`: workers, and engines; 128 samples per worker.

    The messages of a bucket pass while the next one is copied, and engines call the weight store while the
    next ones are called: what exceeds that is on the critical path.
    """
    samples, rounds = SAMPLES_PER_WORKER * w, math.ceil(math.log2(w))
    differencing = samples * w * u["differencing_per_sum"]
    balancing = u[f"balancing_{w}"]
    hops = 2 * (w - 1)
    rings = u["all_reduces_before"] * hops, u["gathers"] * hops
    swaps = u["all_reduces"] * rounds, u["gathers"] * rounds
    ring_cpu = rings[0] * u["ring_hop"] + rings[1] * u["ring_gather_hop"]
    pair_cpu = swaps[0] * u["swap_round"] + swaps[1] * u["gather_round"]
    pickles = SAMPLES_PER_WORKER * u["pickled_sample"]
    polled = w * 2 * 1000 * PUSH_SECONDS * u["tcp_store_request"]
    served = min(w, NODE) * BUCKETS * u["transfer_store_bucket"]
    periods = 2.0, max(LIVENESS_SECONDS, w / RECEIVERS_PER_SECOND)
    pushes = u["broadcast_push_replica"], u["broadcast_reference_replica"]
    commands = pair(
        w * ((BROADCASTS + int(PUSH_SECONDS / period)) * u["broadcast_replica"] + push)
        for period, push in zip(periods, pushes, strict=True)
    )
    store_calls = pair(w * calls * u["store_call"] for calls in STORE_CALLS)
    intervals = RENEW_SECONDS, renewal_seconds(w)
    renewals = pair(w * STEP_SECONDS / each * u["store_call"] for each in intervals)
    polls = pair(w * STEP_SECONDS / each * u["train_poll"] for each in (0.1, poll_interval(w, least=0.5)))
    loop = STEP_SECONDS * (u["controller_idle"] + w * u["controller_replica"])
    checks = pair(w * STEP_SECONDS / each * u["health_check"] for each in (2.0, health_check_period(w)))
    alone = SAMPLES_PER_WORKER * SOURCES
    groups = SAMPLES_PER_WORKER // GROUP_SIZE
    to_source = SAMPLES_PER_WORKER * NODE, groups * NODE  # requests to a replica of a source, one per node
    every_part = w * w * PARTS * CALLS_WITH_PARTS * u["reference"] + w * CALLS * u["mailbox_rank"]
    own_parts = w * (CALLS * u["mailbox_rank"] + CALLS_WITH_PARTS * PARTS * u["mailbox_part"])
    return [
        Row("balancing", "every worker", (differencing, balancing), (differencing, balancing)),
        Row(
            "numbers and objects between workers",
            "every worker",
            (ring_cpu + sum(rings) * HOP_SECONDS, pair_cpu + sum(swaps) * HOP_SECONDS),
            (ring_cpu, pair_cpu),
        ),
        Row("samples between workers", "every worker", same(pickles), same(pickles)),
        Row(
            "store of a push by IPC",
            "worker 0, or one per node",
            (max(0.0, polled - PUSH_SECONDS), max(0.0, served - PUSH_SECONDS)),
            (polled, served),
        ),
        Row("commands to the engines", "worker 0", commands, commands),
        Row(
            "calls of the weight store",
            "the weight store",
            pair(max(0.0, c - made) for c, made in zip(store_calls, commands, strict=True)),
            (store_calls[0] + renewals[0], store_calls[1] + renewals[1]),
        ),
        Row("polls of the workers", "Train's controller", (0, 0), polls),
        Row("health checks", "Serve's controller", (0, 0), checks),
        Row("its control loop", "Serve's controller", (0, 0), same(loop)),
        Row("reports", "the board", (0, 0), same(REPORTS * u["board_report"])),
        Row("rollout requests", "every worker", (0, 0), same(groups * u["stream_caller"])),
        Row(
            "reward requests",
            "every worker",
            (u["request_of_one_caller"], u["request_of_eight_caller"]),
            (alone * u["request_of_one_caller"], groups * SOURCES * u["request_of_eight_caller"]),
        ),
        Row(
            "reward requests",
            "a source's replica",
            (0, 0),
            (to_source[0] * u["request_of_one_replica"], to_source[1] * u["request_of_eight_replica"]),
        ),
        Row(
            "calls of a separate critic",
            "the channel",
            (every_part, own_parts),
            (every_part, own_parts),
            False,
        ),
    ]


def critical_path(found: list[Row], when: int) -> float:
    return sum(row.critical[when] for row in found if row.in_total)


def by_process(found: list[Row], when: int) -> dict[str, float]:
    """Seconds of CPU per step. Worker 0 does what every worker does, too."""
    spent: dict[str, float] = {}
    for row in found:
        if row.in_total:
            name = "worker 0" if row.process.startswith("worker 0") else row.process
            spent[name] = spent.get(name, 0.0) + row.cpu[when]
    spent["worker 0"] += spent.pop("every worker")
    return spent
