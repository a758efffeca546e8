"""The results as a page and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.arithmetic import Spread, share_of_limit, speedup, spread
from benchmarks.peers.cases.case import BF16, OURS, WARMUP_STEPS, Case
from benchmarks.peers.cases.registry import CASES
from benchmarks.peers.products import NUM_WEIGHTS
from jobs.demo.model import MODEL_NAME

Results = Mapping[str, Mapping[str, Any]]  # by case, as peers.json has them


def values(result: Mapping[str, Any], side: str) -> list[float]:
    return [run["value"] for run in result["runs"].get(side, [])]


def ratio(case: Case, result: Mapping[str, Any], side: str) -> Spread | None:
    """How many times as fast ours is as `side`; None where one of them was not measured."""
    ours, theirs = values(result, OURS), values(result, side)
    pairs = min(len(ours), len(theirs))
    if pairs == 0:
        return None
    return speedup(ours[:pairs], theirs[:pairs], higher_is_better=case.higher_is_better)


def share(case: Case, result: Mapping[str, Any], side: str) -> float | None:
    """Of the limit of matrix products, which was measured next to each pair."""
    found = values(result, side)
    if not case.trains_all_weights or not found or result["model"] != MODEL_NAME:
        return None
    limit = statistics.median(each["fp32"] for each in result["limits"])
    return share_of_limit(NUM_WEIGHTS, statistics.median(found), limit)


def markdown(results: Results) -> str:
    newest = list(results.values())[-1]
    rows: list[str] = []
    for name, result in results.items():
        rows += case_rows(CASES[name], result)
    return "\n".join(
        [
            "# rayrlhf next to its peers, on CPUs",
            "",
            "Medians over the runs of each side, which alternate: ours, peer, ours, peer. “times as "
            "fast” is ours over that side: the ratio of the medians, and in brackets the smallest and "
            "the largest ratio of a pair. Steps are steady ones, without start-up and the first "
            f"{WARMUP_STEPS}; tokens are real ones, without padding. Memory is the peak of all processes "
            "of a run, Ray's included, with shared memory counted once.",
            "",
            "Peers compute in fp32 and, in rows with “bf16”, on CPUs that have units for it, with bf16 "
            "autocast. Ours has its default, `model.dtype: auto`: on such CPUs the factors of matrix "
            "products are rounded to bf16, and all else is fp32; “ours, fp32” rounds nothing, and is to be "
            "compared with TRL's own row without “bf16”.",
            "",
            "| case | side | value | runs | times as fast | share of the product limit | start | peak "
            "memory |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            *limits(results),
            "",
            "![times as fast](peers.png)",
            "",
            "## What is compared",
            "",
            *(
                f"- **{name}** ({CASES[name].title}): {CASES[name].compared} Not the same: "
                f"{CASES[name].differs}"
                for name in results
            ),
            "",
            *(failures(results)),
            "## Start",
            "",
            "From the command to the beginning of the first step; of jobs with rollouts, to the first "
            "request to a running engine. Ours checks, starts Ray, places, loads and, there, starts "
            "Serve and vLLM; the peers load in one process.",
            "",
            "| case | ours | peer | times as fast |",
            "|---|---:|---:|---:|",
            *starts(results),
            "",
            "## Parts of a step, and checks",
            "",
            "Means over the measured steps; `time/` in seconds. `wall_over_metrics` is the clock "
            "between the lines of our first and last step over the durations in our metrics; "
            "`packing_error` the largest difference between TRL's logits of packed sequences and of "
            "each in a separate pass.",
            "",
            *details(results),
            "",
            "## Machine",
            "",
            machine(newest["machine"]),
            "",
            '`make bench` repeats all of it; `make bench BENCH_ARGS="sft-packed --pairs 3"` one case.',
            "",
        ]
    )


def case_rows(case: Case, result: Mapping[str, Any]) -> list[str]:
    rows: list[str] = []
    for position, side in enumerate(case.sides):
        name = f"{case.name}, {result['date']}" if position == 0 else ""
        runs = result["runs"].get(side, [])
        if not runs:
            why = result["failures"].get(side)
            if why is None and side.endswith(BF16):  # the CPU had no units for it
                continue
            text = "not measured" if why is None else f"failed: {why.splitlines()[0]}"
            rows.append(f"| {name} | {side} | {text} | 0 | | | | |")
            continue
        found = spread(values(result, side))
        against = None if side == OURS else ratio(case, result, side)
        part = share(case, result, side)
        seconds = _start_seconds(result, side)
        peak = statistics.median(run["peak_bytes"] for run in runs)
        cells = [
            name,
            side,
            f"{found.median:.4g} {case.unit}",
            str(len(runs)),
            f"**{against.median:.2f}** ({against.low:.2f} to {against.high:.2f})" if against else "",
            f"{part:.0%}" if part is not None else "",
            f"{statistics.median(seconds):.0f} s" if seconds else "",
            f"{peak / 1e9:.1f} GB" if peak else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def limits(results: Results) -> list[str]:
    found = [limit for result in results.values() for limit in result["limits"]]
    fp32, bf16 = (spread([each[kind] / 1e9 for each in found]) for kind in ("fp32", "bf16"))
    return [
        "The limit is that of matrix products of the model's shapes (1,024 tokens; forward, towards the "
        f"inputs and towards the weights), measured before each pair: fp32 {fp32.median:.0f} GFLOP/s "
        f"({fp32.low:.0f} to {fp32.high:.0f}), bf16 {bf16.median:.0f} ({bf16.low:.0f} to "
        f"{bf16.high:.0f}). The share of it is 6 · {NUM_WEIGHTS / 1e6:.1f} M · tokens/s: the weights of "
        "all linear layers and, once, of the head, whose matrix is the embedding's. Attention's own "
        "products are left out."
    ]


def failures(results: Results) -> list[str]:
    lines = [
        f"- {name}, {side}:\n\n```\n{why}\n```\n"
        for name, result in results.items()
        for side, why in result["failures"].items()
    ]
    return ["## What did not run", "", *lines] if lines else []


def starts(results: Results) -> list[str]:
    lines: list[str] = []
    for name, result in results.items():
        peer = CASES[name].peer
        if peer.startswith(OURS):
            continue
        ours, theirs = (_start_seconds(result, side) for side in (OURS, peer))
        pairs = min(len(ours), len(theirs))
        if pairs == 0:
            continue
        found = speedup(ours[:pairs], theirs[:pairs], higher_is_better=False)
        lines.append(
            f"| {name} | {statistics.median(ours):.0f} s | {peer}: {statistics.median(theirs):.0f} s | "
            f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f}) |"
        )
    return lines


def _start_seconds(result: Mapping[str, Any], side: str) -> list[float]:
    runs = result["runs"].get(side, [])
    return [run["startup_seconds"] for run in runs if run["startup_seconds"] is not None]


def details(results: Results) -> list[str]:
    """One line per run side that has parts or notes: their medians over its runs."""
    lines: list[str] = []
    for name, result in results.items():
        for side, runs in result["runs"].items():
            found = [{**run.get("parts", {}), **run.get("notes", {})} for run in runs]
            keys = dict.fromkeys(key for each in found for key in each)
            medians = {key: statistics.median(each[key] for each in found if key in each) for key in keys}
            if shown := ", ".join(f"{key} {value:.4g}" for key, value in medians.items() if value):
                lines.append(f"- {name}, {side}: {shown}")
    return lines


def machine(found: Mapping[str, Any]) -> str:
    ours = ", ".join(f"{name} {number}" for name, number in found["ours"].items())
    peers = ", ".join(f"{name} {number}" for name, number in found["peers"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores ({', '.join(found['flags'])}), {found['memory_gb']} GB, "
        f"load average {found['load_average']}; two cores and two threads for each side. Ours: {ours}. "
        f"Peers: {peers}."
    )


def plot(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [
        (name, side)
        for name, result in results.items()
        for side in (CASES[name].peer, CASES[name].peer + BF16)
        if result["runs"].get(side)
    ]
    found = {(name, side): ratio(CASES[name], results[name], side) for name, side in compared}
    drawn = {bar: each for bar, each in reversed(found.items()) if each is not None}
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(drawn)))
    labels = [f"{name}\nvs {side}" for name, side in drawn]
    medians = [each.median for each in drawn.values()]
    errors = [
        [each.median - each.low for each in drawn.values()],
        [each.high - each.median for each in drawn.values()],
    ]
    axes.barh(labels, medians, xerr=[[max(0.0, e) for e in side] for side in errors], capsize=3)
    axes.axvline(1, color="gray", linestyle="--")
    for position, (name, _) in enumerate(drawn):
        if (ideal := CASES[name].ideal) is not None:
            axes.plot([ideal], [position], marker="|", markersize=16, color="black")
    axes.set_xlabel("ours, times as fast (whiskers: smallest and largest pair; tick: ideal)")
    axes.tick_params(axis="y", labelsize="small")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
