"""Prints a run's `summary.json`: evaluation before and after, time per phase, path of the model.

Usage: `python -m rayrlhf.observe.summary <run folder>`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.data.images import FAMILIES as VISION_FAMILIES
from rayrlhf.observe.answers import chain_summary, generation_summary
from rayrlhf.storage.urls import is_url
from rayrlhf.terminal import make_console
from rayrlhf.untrusted_text import one_line, visible

OPENED_BY = {"rm": "AutoModelForSequenceClassification", "prm": "AutoModelForTokenClassification"}
LOG_WIDTH = 110  # where the output is not a terminal
SAMPLE_CHARACTERS = 4_000  # of a prompt or a response; rollouts.jsonl and eval/ have all of it


def show_summary(run_path: Path, console: Console | None = None, *, place: str | None = None) -> None:
    """Print the summary of the run in `run_path`. Raises `FileNotFoundError` when there is none.

    `place`: where users find the run's folder, if not at `run_path`.
    """
    summary = json.loads((run_path / "summary.json").read_text())
    console = console or make_console(log_width=LOG_WIDTH)
    console.print()
    if "rounds" in summary or "output" in summary:
        for part in (chain_summary if "rounds" in summary else generation_summary)(summary):
            console.print(part, soft_wrap=isinstance(part, Text))
        return
    if "evaluation" in summary:
        console.print(metrics_table(summary))
    else:
        console.print(rewards_table(summary))
        console.print(verdict(summary))
        for sample in summary["samples"]:
            console.print()
            console.print(sample_lines(sample))
    console.print()
    console.print(phases_table(summary))
    if summary["export"]:
        opened_by = OPENED_BY.get(summary.get("job", "")) or _opened_by(run_path / "export")
        once = ", once it is copied to a disk" if is_url(summary["export"]) else ""
        text = f"The trained model, for {opened_by}.from_pretrained{once}: {summary['export']}"
        console.print(Text(visible(text)), soft_wrap=True)
    line = f"Metrics, rollouts and the resolved config: {place or run_path}"
    console.print(Text(visible(line)), soft_wrap=True)


def _opened_by(export: Path) -> str:
    file = export / "config.json"
    kind = json.loads(file.read_text()).get("model_type") if file.is_file() else None
    return "AutoModelForImageTextToText" if kind in VISION_FAMILIES else "AutoModelForCausalLM"


def metrics_table(summary: dict[str, Any]) -> Table:
    """A supervised job's held-out metrics before and after."""
    before, after = (summary["evaluation"][when] or {} for when in ("before", "after"))
    samples = after.get("eval/samples", before.get("eval/samples", 0))
    table = Table(
        title=f"{samples:.0f} held-out samples, {summary['steps']} training steps", title_justify="left"
    )
    table.add_column("")
    for when in ("before", "after"):
        table.add_column(when, justify="right")
    shown = [key for key in after or before if key != "eval/samples" and "_ci_" not in key]
    for key in shown:
        cells = (f"{each[key]:.4f}" if key in each else "not measured" for each in (before, after))
        table.add_row(key.removeprefix("eval/").replace("_", " "), *cells)
    if not shown:
        table.add_row("no held-out samples", "not measured", "not measured")
    return table


def rewards_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"Held-out reward, {summary['steps']} training steps", title_justify="left")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for when in ("before", "after"):
        mean, interval = summary[f"reward_{when}"], summary[f"reward_{when}_ci"]
        if mean is None or interval is None:
            table.add_row(when, "not measured", "")
        else:
            table.add_row(when, f"{mean:+.3f}", f"{interval[0]:+.3f} to {interval[1]:+.3f}")
    return table


def verdict(summary: dict[str, Any]) -> Text:
    """Whether the two intervals show a change of the reward."""
    before, after = summary["reward_before_ci"], summary["reward_after_ci"]
    if before is None or after is None:
        return Text("Warning: without held-out prompts the effect of training is unknown.", style="yellow")
    if after[0] > before[1]:
        return Text("The reward rose: the intervals do not overlap.", style="green")
    if after[1] < before[0]:
        return Text("Warning: the reward fell: the intervals do not overlap.", style="yellow")
    return Text(
        "Warning: the intervals overlap, so this run does not show that the reward changed.", style="yellow"
    )


def sample_lines(sample: dict[str, Any]) -> Text:
    """One held-out prompt with the model's response before and after training."""
    lines = Text()
    lines.append(f"{visible(_prompt_text(sample['prompt']), limit=SAMPLE_CHARACTERS)}\n", style="bold")
    for when, end in (("before", "\n"), ("after", "")):
        lines.append(f"  {when:<6} {sample[f'reward_{when}']:+.2f}  ", style="dim")
        lines.append(one_line(sample[when], limit=SAMPLE_CHARACTERS) + end)
    return lines


def phases_table(summary: dict[str, Any]) -> Table:
    """Seconds per phase, the longest first; time outside of phases is last."""
    phases = sorted(summary["seconds_per_phase"].items(), key=lambda item: -item[1])
    total = summary["seconds_total"]
    rest = total - sum(seconds for _, seconds in phases)
    table = Table(title="Where the time went", title_justify="left", show_footer=True)
    table.add_column("phase", footer="total")
    table.add_column("seconds", justify="right", footer=f"{total:.1f}")
    table.add_column("share", justify="right")
    for name, seconds in [*phases, ("other", max(0.0, rest))]:
        table.add_row(name, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %" if total else "")
    return table


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """The prompt column holds plain text or chat messages; of a chat the last message is the question."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


if __name__ == "__main__":
    show_summary(Path(sys.argv[1]))
