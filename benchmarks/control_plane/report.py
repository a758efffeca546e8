"""The page of control_plane.md."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.control_plane.model import (
    BUCKETS,
    HOP_SECONDS,
    PUSH_SECONDS,
    SAMPLES_PER_WORKER,
    SIZES,
    STEP_SECONDS,
    TARGET,
    Row,
)

UNITS = {
    "differencing_per_sum": "Karmarkar and Karp's method, per item and part",
    "balancing_512": "balancing 65,536 samples over 512 workers",
    "pickled_sample": "a sample of 2,048 tokens, pickled and unpickled",
    "ring_hop": "a hop of gloo's ring of all-reduce",
    "ring_gather_hop": "a hop of gloo's ring of all-gather",
    "swap_round": "a round of swaps in pairs, of numbers",
    "gather_round": "a round of swaps in pairs, of objects",
    "tcp_store_request": "torch's TCPStore, per request",
    "transfer_store_bucket": "the transfer store, per bucket and device by IPC",
    "store_call": "the weight store, per call",
    "train_poll": "Ray Train's controller, per worker and poll",
    "health_check": "Serve's controller, per health check",
    "controller_idle": "Serve's controller, per second, without replicas to speak of",
    "controller_replica": "and per second and replica, without health checks",
    "broadcast_replica": "a command to all engines, per engine, in the caller",
    "broadcast_push_replica": "the same of a push with the layout of an 8B model, by value",
    "broadcast_reference_replica": "and by reference",
    "actor_call": "a call of an actor without Serve, in the caller",
    "request_of_one_caller": "a reward request of one sample, in the caller",
    "request_of_eight_caller": "and of a group of eight",
    "request_of_one_replica": "a reward request of one sample, in the replica",
    "request_of_eight_replica": "and of a group of eight",
    "stream_caller": "a rollout request of a group of eight, in the caller",
    "board_report": "the board, per report of 60 metrics",
    "mailbox_rank": "a separate critic's channel, per call and rank of actor and critic",
    "mailbox_part": "and per micro-batch",
    "reference": "an actor, per reference that it returns",
}


def page(report: dict[str, Any], tables: dict[int, list[Row]]) -> str:
    limit, counts = TARGET * STEP_SECONDS, report["counts"]
    return "\n".join(
        [
            f"# The control plane at {', '.join(map(str, SIZES[:-1]))} and {SIZES[-1]} GPUs",
            "",
            f"Seconds of a step of {STEP_SECONDS:g} s, on paper: the unit costs below, measured on CPUs with "
            "fake replicas and workers, times how often a step needs them. There are as many workers as "
            f"engines, {SAMPLES_PER_WORKER} samples per worker in groups of 8 and two reward sources. No run "
            "of this size has taken place.",
            "",
            f"The target is {TARGET:.0%} of a step, {limit:g} s: of the step itself (critical path) and of "
            "each process. Before is the design of the first version: replicas checked every 2 s, workers "
            "polled at 10 Hz, a reward request per sample, Karmarkar and Karp's balancing, one TCPStore that "
            "every GPU polls twice per millisecond. Its collectives were NCCL's, which spin on GPUs; taken "
            f"here are gloo's rings, which came next. A push of an 8B model has {BUCKETS} buckets and takes "
            f"{PUSH_SECONDS:g} s; a message takes {1e6 * HOP_SECONDS:g} us between nodes in addition to its "
            "CPU time. What passes in the shadow of other work (messages of a bucket while the next one is "
            "copied) counts where it takes longer than that.",
            "",
            "## On the critical path of a step, seconds",
            "",
            *_table(tables, "critical"),
            _total("**sum**", report["critical_seconds"]),
            "",
            "## CPU of a process per step, seconds",
            "",
            *_table(tables, "cpu"),
            "",
            f"Sums of the processes, with worker 0 as one of the workers; more than {limit:g} s in bold:",
            "",
            *_processes(report["process_seconds"], limit),
            "",
            "Not in the sums: a critic in a trainer of its own, with as many workers; its channel is one "
            "process.",
            "",
            "## What is left",
            "",
            *_left(tables[SIZES[-1]], report, limit),
            "",
            "## Unit costs, microseconds of CPU",
            "",
            "On two cores that were not idle: contended CPU seconds are upper bounds.",
            "",
            "| what | median of three | lowest | highest |",
            "|---|---:|---:|---:|",
            *(_unit(name, text, report["units"][name]) for name, text in UNITS.items()),
            "",
            f"A step of GRPO with four mini-batches reduces {counts['all_reduces']:g} times over the workers "
            f"(before, with one for each maximum, {counts['all_reduces_before']:g} times) and gathers "
            f"{counts['gathers']:g} times, counted in the real loop.",
            "",
            *_readiness(report),
            "",
            f"{report['machine']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
            "Command: `python -m benchmarks.control_plane`.",
            "",
        ]
    )


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _head(names: str) -> list[str]:
    sizes = " | ".join(f"{w} GPUs, before | after" for w in SIZES)
    columns = names.count("|") + 1
    return [f"| {names} | {sizes} |", "|" + "---|" * columns + "---:|" * 2 * len(SIZES)]


def _table(tables: dict[int, list[Row]], which: str) -> list[str]:
    lines = _head("what | process")
    for index, row in enumerate(tables[SIZES[-1]]):
        cells = [value for w in SIZES for value in getattr(tables[w][index], which)]
        if any(cells):
            note = "" if row.in_total else " (not in the sum)"
            lines.append(f"| {row.what}{note} | {row.process} | {' | '.join(map(_seconds, cells))} |")
    return lines


def _total(name: str, of_sizes: dict[int, list[float]]) -> str:
    cells = (f"**{_seconds(value)}**" for w in SIZES for value in of_sizes[w])
    return f"| {name} | | {' | '.join(cells)} |"


def _processes(of_sizes: dict[int, list[dict[str, float]]], limit: float) -> list[str]:
    lines = _head("process")
    for name in of_sizes[SIZES[-1]][1]:
        values = [of_sizes[w][when][name] for w in SIZES for when in (0, 1)]
        cells = (f"**{_seconds(v)}**" if v > limit else _seconds(v) for v in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _left(largest: list[Row], report: dict[str, Any], limit: float) -> list[str]:
    """Remarks on what misses the target at the largest size; none on what meets it."""
    micro = 1e6 * statistics.median(report["units"]["actor_call"])
    remarks = {
        "commands to the engines": "worker 0 calls every engine through Serve, five times per step. A call "
        f"of an actor without Serve takes {micro:.0f} us; if every worker called the engines of its node, it "
        "would be eight calls each.",
        "calls of the weight store": "nothing waits for most of them: engines renew their leases.",
        "health checks": "nothing waits for them.",
        "its control loop": "nothing waits for it; Serve looks at every replica ten times per second "
        "(`RAY_SERVE_CONTROL_LOOP_INTERVAL_S`, in the environment of Serve's controller).",
        "calls of a separate critic": "every worker of both sides makes its own calls. Up to 32 workers they "
        "meet the target; beyond that a worker per node should make them.",
    }
    missed = [row for row in largest if row.cpu[1] > limit]
    if unknown := [row.what for row in missed if row.what not in remarks]:
        raise KeyError(f"no remark on {unknown}")
    return [
        f"- {row.what}, {_seconds(row.cpu[1])} s at {SIZES[-1]} GPUs: {remarks[row.what]}" for row in missed
    ]


def _unit(name: str, text: str, runs: list[float]) -> str:
    micro = [1e6 * value for value in (statistics.median(runs), min(runs), max(runs))]
    return f"| {text} | {' | '.join(f'{us:,.2g}' if us < 10 else f'{us:,.0f}' for us in micro)} |"


def _readiness(report: dict[str, Any]) -> list[str]:
    found, counts = report["readiness"], report["counts"]
    bytes_put, bytes_new = found["published_bytes"], found["offloaded_bytes"]
    us, threads = found["output_microseconds"], found["threads"]
    share, slots, chosen = found["cached_turns"], found["requests_per_slot"], found["settings"]
    mib = 2**20
    reduced = counts["all_reduces_before"] + counts["gathers"]
    tokens = 512 * 2048
    lines = [
        (
            "bytes into the object store per push of 64 MiB that reaches every engine",
            f"{bytes_put['before'] // mib} MiB",
            f"{bytes_put['after'] // mib} MiB",
            "seconds per push",
        ),
        (
            "reductions and gathers of bookkeeping by NCCL per step",
            f"{reduced:g}",
            f"0 (`{chosen['backend']}`)",
            "how much faster an engine is on a GPU on which no rank spins",
        ),
        (
            "Python of an engine's log-probabilities, us per token",
            f"{us['before']:.1f}",
            f"{us['after']:.1f}",
            "tokens/s at 256 and more sequences",
        ),
        ("`max_num_batched_tokens`", "2,048", f"{chosen['batch_tokens']:,}", "time to the first token"),
        (
            "tokens computed again per asynchronous push, of 512 requests of 2,048",
            f"{tokens:,}",
            f"0 with `running: keep`; {tokens:,} with `{chosen['running_requests']}`, the default",
            "seconds per push; what stale keys and values do to learning",
        ),
        (
            "threads of a trainer: 96 cores and 8 GPUs per node, 16 workers, driver with 8 cores",
            f"{threads['before']}",
            f"{threads['after']}",
            "seconds of an optimizer on the host",
        ),
        (
            "host memory allocated anew per offload of 64 MiB of states",
            f"{bytes_new['before'] // mib} MiB, pageable",
            f"{bytes_new['after'] // mib} MiB, pinned on GPUs",
            "GB/s; that of ZeRO-1 and 2 is DeepSpeed's",
        ),
        (
            "requests that an engine may have per request that it computes",
            f"{slots['before']:g}",
            f"{slots['after']:g}",
            "share of the time in which the batch is full",
        ),
        (
            "later turns of 512 sessions that find their prefix, 8 engines",
            f"{share['before']:.0%}",
            f"{share['after']:.0%}",
            "time to the first token of a turn",
        ),
        ("rows of logits per chunk", "256", f"{chosen['chunk']:,}", "seconds of the head"),
        ("gradients of the shipped configs add up in", "bf16", f"{chosen['grad_accum_dtype']}", "-"),
        (
            "reward requests of a worker per step",
            f"{2 * SAMPLES_PER_WORKER}",
            f"{2 * SAMPLES_PER_WORKER // 8}",
            "-",
        ),
    ]
    return [
        "## How GPUs are used: what a CPU can measure",
        "",
        "| what | before | after | what only GPUs can tell |",
        "|---|---:|---:|---|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
