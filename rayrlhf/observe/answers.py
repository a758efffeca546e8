"""Summaries of batch inference and of chains of jobs in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rayrlhf.untrusted_text import one_line, visible

SAMPLE_CHARACTERS = 4_000  # of a prompt or a response; the output has all of it


def generation_summary(summary: dict[str, Any]) -> Iterator[RenderableType]:
    """Results of batch inference: counts, scores, speed and samples."""
    table = Table(title=f"{summary['rows']} rows", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name in ("samples", "failed_rows", "truncated_samples", "prompt_tokens", "response_tokens"):
        if summary[name] or name in ("samples", "failed_rows"):
            table.add_row(name.replace("_", " "), str(summary[name]))
    for reason, count in summary["left_out"].items():
        table.add_row(f"left out: {reason.replace('_', ' ')}", str(count))
    if summary["score_mean"] is not None:
        table.add_row("mean score", _score(summary))
        table.add_row("unscored samples", str(summary["unscored_samples"]))
    table.add_row("response tokens per second", f"{summary['response_tokens_per_second']:.0f}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    yield table
    for sample in summary["shown"]:
        yield _sample(sample)
    yield Text(visible(f"Answers: {summary['output']}"))


def chain_summary(summary: dict[str, Any]) -> Iterator[RenderableType]:
    """Results of the stages of a chain, one row per round."""
    rounds = summary["rounds"]
    keys = list(dict.fromkeys(key for entry in rounds for key in entry["counts"]))
    table = Table(title=f"{summary['job'].replace('_', ' ')}", title_justify="left")
    table.add_column("round")
    table.add_column("mean score of its start", justify="right")
    for key in keys:
        table.add_column(key.replace("_", " "), justify="right")
    for entry in rounds:
        counts = (str(entry["counts"].get(key, "")) for key in keys)
        table.add_row(str(entry["round"]), _score(entry), *counts)
    if summary.get("last") is not None:
        table.add_row("last export", _score(summary["last"]), *("" for _ in keys))
    yield table
    if summary["export"]:
        line = f"The trained model, for AutoModelForCausalLM.from_pretrained: {summary['export']}"
        yield Text(visible(line))


def _score(entry: dict[str, Any]) -> str:
    mean, interval = entry["score_mean"], entry["score_ci"]
    if mean is None:
        return "none"
    return f"{mean:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def _sample(sample: dict[str, Any]) -> Text:
    prompt, response = sample["prompt"], sample["response"]
    if isinstance(prompt, list):
        prompt = prompt[-1].get("content", "")
    lines = Text()
    lines.append(f"{one_line(str(prompt), limit=SAMPLE_CHARACTERS)}\n", style="bold")
    score = "" if sample["score"] is None else f"{sample['score']:+.2f}  "
    lines.append(f"  {score}", style="dim")
    lines.append("(failed)" if response is None else one_line(response, limit=SAMPLE_CHARACTERS))
    return lines
