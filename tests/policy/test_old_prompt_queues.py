"""Checkpoints of versions before November 2026 call the next prompt batch `next_draw`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.policy.prompt_queue import PromptQueue
from tests.samples import make_prompt


@pytest.mark.parametrize("per_rank", [2, 1])  # as many workers, and twice as many
def test_an_old_queue_is_loaded(per_rank: int, tmp_path: Path) -> None:
    # Prompt batches of two; 0 is finished, 1 is not, 2 has been fetched and waits.
    prompts = PromptQueue(rank=0, per_rank=2, prompts_per_batch=2)
    prompts.connect(
        (batch, [make_prompt(row_id=2 * batch), make_prompt(row_id=2 * batch + 1)]) for batch in range(4)
    )
    prompts.take(3)
    prompts.finish([0])
    prompts.save(tmp_path)
    [file] = tmp_path.iterdir()
    saved = json.loads(file.read_text())
    saved["next_draw"] = saved.pop("next_batch")
    file.write_text(json.dumps(saved))
    resumed = PromptQueue(rank=0, per_rank=per_rank, prompts_per_batch=2)
    resumed.load(tmp_path)
    assert resumed.next_batch == 2
    mine = [1, 2, 3] if per_rank == 2 else [2]
    assert [group_id for group_id, _ in resumed.take(len(mine))] == mine
