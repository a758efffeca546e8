"""Log-probabilities of the frozen reference: computed at every step, or precomputed into a table on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_sums
from rayrlhf.batch import ExampleBatch, pack_examples, padding_examples
from rayrlhf.config.supervised import FrozenRefConfig, SupervisedConfig
from rayrlhf.samples import Example
from rayrlhf.train import collectives
from rayrlhf.train.learner import Learner
from rayrlhf.train.reference import AdaptersOff, LocalReference, Reference


def packed(examples: Sequence[Example], config: SupervisedConfig) -> ExampleBatch:
    """A micro-batch of these examples; without any, a padding batch."""
    if not examples:
        return padding_examples(config.data.sequences_per_example)
    return pack_examples(examples, share_prefixes=config.train.share_prefixes)


class FrozenReference:
    """Adds `ref_sums` [S], the log-probability of each sequence's loss tokens, to micro-batches.

    With `precompute` the sums are looked up in tables, one per split, which `fill` creates: [rows up to the
    last one needed, sequences per example]. The model is then held only during `fill`.
    """

    def __init__(self, config: SupervisedConfig, ref: FrozenRefConfig, learner: Learner) -> None:
        """`learner`: the trained model, which is also the reference while its adapters are disabled."""
        self.config = config
        self.ref = ref
        self.learner = learner
        self.tables: dict[str, Tensor] = {}
        self.model: Reference | None = None if ref.precompute else self._load()

    def _load(self) -> Reference:
        if self.config.model.holds_reference(self.ref.path):
            return AdaptersOff(self.learner)
        return LocalReference(self.config.model, self.ref.path or self.config.model.path, self.config.train)

    def added(
        self, batches: Sequence[ExampleBatch], split: str, *, sequence: int | None = None
    ) -> list[ExampleBatch]:
        """The batches with `ref_sums`. Collective. `sequence`: index of the one sequence of each example that
        the batches hold; None if they hold all.
        """
        if self.model is not None:
            per_token = self.model.logprobs(batches, temperature=1.0)
            sums = [
                sequence_sums(logprobs, batch.loss_mask, batch.cu_seqlens)
                for logprobs, batch in zip(per_token, batches, strict=True)
            ]
        else:
            sums = [self._looked_up(batch, split, sequence) for batch in batches]
        return [replace(b, ref_sums=s) for b, s in zip(batches, sums, strict=True)]

    def _looked_up(self, batch: ExampleBatch, split: str, sequence: int | None) -> Tensor:
        table = self.tables[split]
        rows = batch.row_ids.cpu()
        if sequence is None:  # a row's sequences are consecutive
            which = torch.arange(len(rows)) % table.size(1)
        else:
            which = torch.full_like(rows, sequence)
        sums = torch.where(rows >= 0, table[rows.clamp_min(0), which], 0.0)
        return sums.to(batch.input_ids.device)

    def fill(
        self,
        split: str,
        path: Path,
        steps: Iterable[tuple[int, list[list[Example]]]] | None,
        on_progress: Callable[[int], None],
    ) -> None:
        """Load the split's table from `path`, or compute it in a pass over the rows that are needed, `steps`,
        and save it there on rank 0. Collective.

        `on_progress` is called with the number of rows that this rank has done.
        """
        if steps is None:
            self.tables[split] = torch.from_numpy(np.load(path, allow_pickle=False))
            return
        self.model = self.model or self._load()
        pairs: list[tuple[int, list[float]]] = []
        per_example = self.config.data.sequences_per_example
        for _, micro_batches in steps:
            batches = [packed(examples, self.config).to(collectives.device()) for examples in micro_batches]
            for batch in self.added(batches, split):
                assert batch.ref_sums is not None
                rows = batch.row_ids.view(-1, per_example)[:, 0].tolist()
                pairs += zip(rows, batch.ref_sums.view(-1, per_example).tolist(), strict=True)
            on_progress(len(pairs))
        gathered = [pair for pair in collectives.gather_lists(pairs) if pair[0] >= 0]
        table = np.full((1 + max(row for row, _ in gathered), per_example), np.nan, dtype=np.float32)
        for row, sums in gathered:
            table[row] = sums
        if collectives.rank() == 0:
            partial = path.with_suffix(".partial.npy")
            np.save(partial, table)
            partial.rename(path)
        self.tables[split] = torch.from_numpy(table)

    def forget_model(self) -> None:
        """Free the model's memory once all tables are filled."""
        self.model = None


class RefTable(NamedTuple):
    """Table of the reference's log-probabilities for the rows of a split that are needed."""

    file: str
    num_rows: int


def is_whole(file: Path) -> bool:
    """Whether a table is intact: not truncated, and not a file that numpy would have to unpickle."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).dtype == np.float32
    except (ValueError, OSError, EOFError):
        return False


def table_path(folder: Path, split: str, fingerprint: str, rows: np.ndarray, reference: str) -> Path:
    """The table's file for these rows and this reference; its name depends on rows and weights."""
    weights = sorted(Path(reference).glob("*.safetensors"))
    state: Any = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    digest = hashlib.sha256(repr((fingerprint, rows.tolist(), reference, state)).encode()).hexdigest()
    return folder / f"ref-{split}-{digest[:16]}.npy"
