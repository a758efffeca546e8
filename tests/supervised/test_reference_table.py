"""The reference's answers, kept on disk: taken when whole, asked for again when not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.supervised.reference_table import is_whole
from tests.train.checkpoints import cut


class Planted:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def test_29_a_cut_table_is_not_taken(tmp_path: Path) -> None:
    """It ended the run with a traceback."""
    file = tmp_path / "ref.npy"
    np.save(file, np.ones((1000, 2), dtype=np.float32))
    assert is_whole(file)
    cut(file)
    assert not is_whole(file)
    for content in (b"", b"text", bytes(range(256))):
        file.write_bytes(content)
        assert not is_whole(file)
    assert not is_whole(tmp_path / "none.npy")


def test_20_a_planted_pickle_in_a_table_is_not_run(tmp_path: Path) -> None:
    file, proof = tmp_path / "ref.npy", tmp_path / "proof"
    np.save(file, np.array([Planted(proof)], dtype=object), allow_pickle=True)
    proof.unlink(missing_ok=True)
    assert not is_whole(file) and not proof.exists()
