"""Where reports go: console, TensorBoard, Weights & Biases, JSON lines."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError

from rayrlhf.config.job import JobConfig
from rayrlhf.observe.board import Report, Taker
from rayrlhf.observe.console import Console

TAKE_SECONDS = 1.0
RETRY_SECONDS = 0.2
DRAIN_DEADLINE_SECONDS = 30.0


class Sink(Protocol):
    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl` (one line per step or evaluation), `rollouts.jsonl`, `eval/<when>-<step>.jsonl`."""

    def __init__(self, run_path: Path) -> None:
        self.run_path = run_path

    def write(self, report: Report) -> None:
        if report.kind in ("step", "eval"):
            # NaN (an undefined explained variance, say) is not JSON.
            known = {key: value if math.isfinite(value) else None for key, value in report.metrics.items()}
            self._append("metrics.jsonl", [{"step": report.step, **known}])
        if report.kind == "rollouts":
            self._append("rollouts.jsonl", report.rows)
        if report.kind == "eval":
            (self.run_path / "eval").mkdir(exist_ok=True)
            self._append(f"eval/{report.text}-{report.step:06d}.jsonl", report.rows)

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        with (self.run_path / name).open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def close(self) -> None:
        pass


class TensorBoard:
    def __init__(self, run_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_path / "tensorboard"))

    def write(self, report: Report) -> None:
        for key, value in report.metrics.items():
            self.writer.add_scalar(key, value, report.step)
        if report.metrics:
            self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, config: JobConfig, run_path: Path) -> None:
        import wandb

        settings = config.observe.wandb
        assert settings is not None
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            dir=str(run_path),
            config=config.model_dump(mode="json"),
        )

    def write(self, report: Report) -> None:
        if report.metrics:
            self.run.log(report.metrics, step=report.step)

    def close(self) -> None:
        self.run.finish()


class Sinks:
    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def write(self, report: Report) -> None:
        for sink in self.sinks:
            sink.write(report)


@contextmanager
def make_sinks(config: JobConfig, run_path: Path, console: Console) -> Iterator[Sinks]:
    console.start(config.train.total_steps)
    with ExitStack() as stack:
        sinks: list[Sink] = [console, JsonLines(run_path)]
        if config.observe.tensorboard:
            sinks.append(TensorBoard(run_path))
        if config.observe.wandb is not None:
            sinks.append(Wandb(config, run_path))
        for sink in sinks:
            stack.callback(sink.close)
        yield Sinks(sinks)


@contextmanager
def drain_in_background(board: Any, sinks: Sinks) -> Iterator[None]:
    """Feed the board's reports to the sinks while the body runs, and the last ones before it is left."""
    stop = threading.Event()
    taker = Taker()

    def take(seconds: float) -> list[Report]:
        """Waits for a board whose process died; `RayActorError` when it will not come back."""
        while True:
            try:
                return taker.new(*ray.get(board.take.remote(seconds, taker.had)))
            except ActorUnavailableError:
                time.sleep(RETRY_SECONDS)

    def drain() -> None:
        while True:
            stopping = stop.is_set()
            reports = take(0.0 if stopping else TAKE_SECONDS)
            for report in reports:
                sinks.write(report)
            if stopping and not reports:
                return

    thread = threading.Thread(target=drain, daemon=True, name="metrics")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(DRAIN_DEADLINE_SECONDS)
