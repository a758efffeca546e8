"""Console sink: a live progress bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from rayrlhf.observe.board import Report
from rayrlhf.observe.summary import show_summary
from rayrlhf.secrets import masked
from rayrlhf.terminal import SafeConsole, make_console
from rayrlhf.untrusted_text import LINE_CHARACTERS, MESSAGE_CHARACTERS, one_line, visible

PROGRESS_SECONDS = 10.0  # without a line, after which a log shows the progress of a long phase
PHASE_CHARACTERS = 200

# (metric, label, format): one step, one line
COLUMNS = [
    ("reward/mean", "reward", "{:+.3f}"),
    ("loss/model", "loss", "{:.4f}"),
    ("reward/accuracy", "accuracy", "{:.3f}"),
    ("reward/margin", "margin", "{:+.3f}"),
    ("loss/divergence", "divergence", "{:.4f}"),
    ("kl/mean", "kl", "{:.4f}"),
    ("rollout/response_tokens_mean", "response", "{:.0f} tok"),
    ("rollout/tokens_per_second", "rollout", "{:.0f} tok/s"),
    ("train/tokens_per_second", "update", "{:.0f} tok/s"),
    ("time/step", "step", "{:.1f} s"),
]


class Console:
    """A sink. `mode`: live (a progress bar), lines, quiet (errors and summary only), auto (live on a
    terminal).
    """

    def __init__(self, mode: str) -> None:
        interactive = sys.stdout.isatty()
        self.mode = ("live" if interactive else "lines") if mode == "auto" else mode
        self.rich = make_console()
        self.started = time.monotonic()
        self.num_steps = 0
        self.progress: Progress | None = None
        self.task: Any = None
        self.step_seconds: list[float] = []
        self.said_at = self.started
        self.phases_shown: set[str] = set()

    def say(self, text: str) -> None:
        self.said_at = time.monotonic()
        if self.mode != "quiet":
            line = visible(masked(text), limit=LINE_CHARACTERS)
            self.rich.print(Text.assemble((self._clock(), "dim"), " ", line), soft_wrap=True)

    def error(self, text: str) -> None:
        self.close()
        message = visible(masked(text), limit=MESSAGE_CHARACTERS)
        SafeConsole(stderr=True, soft_wrap=True).print(Text.assemble(("error", "bold red"), " ", message))

    def placement(self, slots: Any) -> None:
        from rayrlhf.placement.slots import describe

        for role, units, where in describe(slots):
            self.say(f"placed {role} x {units} on slot {where}")

    def start(self, num_steps: int) -> None:
        self.num_steps = num_steps
        if self.mode == "live":
            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=self.rich,
            )
            self.task = self.progress.add_task("starting", total=num_steps)
            self.progress.start()

    def write(self, report: Report) -> None:
        if report.kind == "phase":
            self._phase(report)
        elif report.kind == "step":
            self._step(report)
        elif report.kind == "event":
            self.say(one_line(report.text))
        elif report.kind == "warning":
            self.say(f"warning: {one_line(report.text)}")
        elif report.kind == "note":
            self.say(report.text)
        elif report.kind == "eval":
            metrics = (
                _rewards(report.metrics) if "eval/reward_mean" in report.metrics else _others(report.metrics)
            )
            self.say(f"evaluation {report.text} step {report.step}: {metrics}")

    def _phase(self, report: Report) -> None:
        if self.progress is not None:
            phase = one_line(masked(report.text), limit=PHASE_CHARACTERS)
            self.progress.update(self.task, description=phase)
            return
        # Before the first step and after the last each phase is printed once; between them the lines of steps
        # are enough. Progress ("3/8 prompts") is too frequent for a line each: it is printed only after
        # PROGRESS_SECONDS without a line.
        around_steps = not self.step_seconds or 0 < self.num_steps <= report.step
        is_new = around_steps and report.text not in self.phases_shown and "/" not in report.text
        if is_new or time.monotonic() - self.said_at > PROGRESS_SECONDS:
            self.phases_shown.add(report.text)
            self.say(one_line(report.text))

    def _step(self, report: Report) -> None:
        self.step_seconds.append(report.metrics.get("time/step", 0.0))
        parts = [
            f"{label} {form.format(report.metrics[key])}"
            for key, label, form in COLUMNS
            if key in report.metrics
        ]
        left = (self.num_steps - report.step) * sum(self.step_seconds) / len(self.step_seconds)
        self.say(f"step {report.step}/{self.num_steps}  " + "  ".join(parts) + f"  left {_minutes(left)}")
        if self.progress is not None:
            self.progress.update(self.task, completed=report.step)

    def summary(self, run_path: Path, place: str | None = None) -> None:
        """`place`: where users find the run's folder, if not at `run_path`."""
        self.close()
        show_summary(run_path, self.rich, place=place)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"


def _rewards(m: dict[str, float]) -> str:
    return (
        f"reward {m['eval/reward_mean']:+.3f} "
        f"(95 % interval {m['eval/reward_ci_low']:+.3f} to {m['eval/reward_ci_high']:+.3f}), "
        f"responses {m['eval/response_tokens_mean']:.0f} tok"
    )


def _others(m: dict[str, float]) -> str:
    """Metrics of a supervised job: the loss with its interval, then the others."""
    interval = f"(95 % interval {m['eval/loss_ci_low']:.4f} to {m['eval/loss_ci_high']:.4f})"
    hidden = ("eval/loss", "eval/loss_ci_low", "eval/loss_ci_high", "eval/samples")
    rest = [f"{k.removeprefix('eval/').replace('_', ' ')} {v:.4f}" for k, v in m.items() if k not in hidden]
    return ", ".join([f"loss {m['eval/loss']:.4f} {interval}", *rest])


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
