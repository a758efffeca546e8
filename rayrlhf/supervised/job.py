"""Job description that the driver of a supervised job passes to every worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayrlhf.config.supervised import SupervisedConfig
from rayrlhf.data.step_order import StepOrder
from rayrlhf.supervised.reference_table import RefTable


@dataclass(frozen=True)
class SupervisedJob:
    config: SupervisedConfig  # the job's own SupervisedConfig, with its number of steps filled in
    run_id: str  # unique per start of a run; prefixes the names of its actors and Serve apps
    threads_per_worker: int
    num_rows: int  # of the training data
    order: StepOrder  # the rows of every training step
    has_eval: bool
    num_sampled: int = 0  # training rows that a reward model scores before its export
    fixed: dict[str, Any] = field(default_factory=dict)  # config values required for resuming
    ref_tables: dict[str, RefTable] = field(default_factory=dict)  # by split

    @property
    def rows_per_pass(self) -> int:
        """Rows that are read at a time without training on them: as many as a training step has."""
        per_step: int | None = self.config.train.samples_per_step
        return per_step or max(1, round(self.order.rows_before(len(self.order)) / len(self.order)))

    @property
    def teacher_app(self) -> str:
        return f"{self.run_id}-teacher"

    @property
    def board(self) -> str:
        return f"{self.run_id}-board"
