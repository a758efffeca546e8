"""What the frozen reference says of a sample: asked at every step, or once beforehand and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_sums
from rayrlhf.batch import PackedBatch, empty_examples, pack_examples
from rayrlhf.config.supervised import FrozenRefConfig, SupervisedConfig
from rayrlhf.samples import Example
from rayrlhf.train import collectives
from rayrlhf.train.learner import Learner
from rayrlhf.train.reference import AdaptersOff, LocalReference, Reference


class FrozenReference:
    """Adds `ref_sums` [S], the log-probability of each sequence's learnt tokens, to micro-batches.

    With `precompute` the sums are looked up in tables, one per split, which `fill` makes: [rows up to the
    last one needed, sequences per example]. The model is then held only while it does.
    """

    def __init__(self, config: SupervisedConfig, ref: FrozenRefConfig, learner: Learner) -> None:
        """`learner` is the model that trains, which is the reference too while its adapters are off."""
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
        self, batches: Sequence[PackedBatch], split: str, *, sequence: int | None = None
    ) -> list[PackedBatch]:
        """`sequence` says which one of their examples' the batches hold, where it is not all. Collective."""
        if self.model is not None:
            told = self.model.logprobs(batches, temperature=1.0)
            sums = [
                sequence_sums(logprobs, batch.loss_mask, batch.cu_seqlens)
                for logprobs, batch in zip(told, batches, strict=True)
            ]
        else:
            sums = [self._looked_up(batch, split, sequence) for batch in batches]
        return [b.with_fields(ref_sums=s) for b, s in zip(batches, sums, strict=True)]

    def _looked_up(self, batch: PackedBatch, split: str, sequence: int | None) -> Tensor:
        assert batch.group_ids is not None
        table = self.tables[split]
        rows = batch.group_ids.cpu()
        if sequence is None:  # a row's sequences follow one another
            which = torch.arange(len(rows)) % table.size(1)
        else:
            which = torch.full_like(rows, sequence)
        sums = torch.where(rows >= 0, table[rows.clamp_min(0), which], 0.0)
        return sums.to(batch.input_ids.device)

    def fill(
        self,
        split: str,
        path: Path,
        steps: Iterable[tuple[int, list[list[Example]]]],
        tell: Callable[[int], None],
    ) -> None:
        """Take the split's table from `path`, or make it from one pass over the rows that are needed, telling
        how many this rank has asked about. Collective.
        """
        if path.is_file():
            self.tables[split] = torch.from_numpy(np.load(path, allow_pickle=False))
            return
        self.model = self.model or self._load()
        told: list[tuple[int, list[float]]] = []
        together = self.config.data.sequences_per_example
        for _, micro_batches in steps:
            batches = [
                (pack_examples(examples) if examples else empty_examples(together)).to(collectives.device())
                for examples in micro_batches
            ]
            for batch in self.added(batches, split):
                assert batch.ref_sums is not None and batch.group_ids is not None
                rows = batch.group_ids.view(-1, together)[:, 0].tolist()
                told += zip(rows, batch.ref_sums.view(-1, together).tolist(), strict=True)
            tell(len(told))
        everyone = [pair for pair in collectives.gather_lists(told) if pair[0] >= 0]
        table = np.full((1 + max(row for row, _ in everyone), together), np.nan, dtype=np.float32)
        for row, sums in everyone:
            table[row] = sums
        if collectives.rank() == 0:
            partial = path.with_suffix(".partial.npy")
            np.save(partial, table)
            partial.rename(path)
        self.tables[split] = torch.from_numpy(table)

    def forget_model(self) -> None:
        """Every table is there: free the memory."""
        self.model = None


class RefTable(NamedTuple):
    """What the reference says of a split's rows that are needed."""

    file: str
    num_rows: int


def is_whole(file: Path) -> bool:
    """Whether a table was not cut, nor replaced by what numpy would have to unpickle."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).dtype == np.float32
    except (ValueError, OSError, EOFError):
        return False


def table_path(folder: Path, split: str, fingerprint: str, rows: np.ndarray, reference: str) -> Path:
    """Where the table of these rows and this reference lies: other rows or weights have another name."""
    weights = sorted(Path(reference).glob("*.safetensors"))
    state: Any = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    digest = hashlib.sha256(repr((fingerprint, rows.tolist(), reference, state)).encode()).hexdigest()
    return folder / f"ref-{split}-{digest[:16]}.npy"
