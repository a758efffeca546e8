"""A run resumes from its newest intact checkpoint, regardless of Ray Train's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train import manifest
from rayrlhf.train.checkpoint import RECORD, newest_first_prompt_batch, newest_step
from rayrlhf.train.find import search, write_record
from tests.train.checkpoints import cut, leave_checkpoint


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Checkpoints of step 2 and 4, both whole."""
    storage = tmp_path / "checkpoints"
    for step in (2, 4):
        leave_checkpoint(storage, step)
    return storage


def steps(storage: Path, *, full: bool = True) -> list[int]:
    return [found.step for found in search(LocalFolder(storage), full=full).whole]


def rays_own_reading(storage: Path) -> tuple[list[str], str | None]:
    """The folders that Ray Train's own code takes from its record, and the newest."""
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext

    context: Any = StorageContext(storage_path=str(storage.parent), experiment_dir_name=storage.name)
    keep: Any = CheckpointConfig(num_to_keep=2)
    manager: Any = CheckpointManager(keep, context)
    newest = manager.latest_checkpoint_result
    names = [Path(result.checkpoint.path).name for result in manager.best_checkpoint_results] or [
        Path(result.checkpoint.path).name for result in manager._checkpoint_results
    ]
    return names, newest and Path(newest.checkpoint.path).name


def test_whole_ones_are_found_newest_first(storage: Path) -> None:
    found = search(LocalFolder(storage), full=True)
    assert [whole.step for whole in found.whole] == [4, 2] and not found.damaged
    assert found.record_problem is None
    assert newest_step(LocalFolder(storage)) == newest_first_prompt_batch(LocalFolder(storage)) == 4
    assert (
        search(LocalFolder(storage / "missing")) == search(LocalFolder(storage.parent / "scratch"))
        and steps(storage / "none") == []
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"7",
        b'{"checkpoint_results": [',
        b'{"checkpoint_results": null, "latest_checkpoint_result": null}',
        b'{"checkpoint_results": [1], "latest_checkpoint_result": null}',
        b'{"checkpoint_results": [], "latest_checkpoint_result": {"checkpoint_dir_name": "a"}}',
        bytes(range(256)),
        None,
    ],
)
def test_29_a_damaged_record_of_ray_train_is_made_again(content: bytes | None, storage: Path) -> None:
    """Each of these ended the run with a traceback, or started it at step 0 although two checkpoints were
    intact.
    """
    record = storage / RECORD
    record.unlink() if content is None else record.write_bytes(content)
    found = search(LocalFolder(storage), full=True)
    assert [whole.step for whole in found.whole] == [4, 2] and not found.damaged
    assert found.record_problem and RECORD in found.record_problem
    write_record(LocalFolder(storage), found)
    assert newest_step(LocalFolder(storage)) == 4 and search(LocalFolder(storage)).record_problem is None
    assert rays_own_reading(storage) == (["step_000002", "step_000004"], "step_000004")


def test_29_a_record_that_names_a_folder_that_is_gone(storage: Path) -> None:
    import shutil

    shutil.rmtree(storage / "step_000004")
    found = search(LocalFolder(storage), full=True)
    assert found.damaged == {"step_000004": f"the folder is gone ({RECORD} names it)"}
    write_record(LocalFolder(storage), found)
    assert newest_step(LocalFolder(storage)) == 2 and not search(LocalFolder(storage)).damaged
    assert rays_own_reading(storage) == (["step_000002"], "step_000002")


@pytest.mark.parametrize(
    "name, problem",
    [
        ("state.json", "state.json has"),
        ("actor/layout.json", "actor/layout.json has"),
        ("actor/engine/model_states.pt", "actor/engine/model_states.pt has"),
        (manifest.MANIFEST, "manifest.json cannot be read"),
    ],
)
def test_29_a_cut_file_costs_the_newest_one_alone(name: str, problem: str, storage: Path) -> None:
    cut(storage / "step_000004" / name)
    found = search(LocalFolder(storage))
    assert [whole.step for whole in found.whole] == [2]
    assert list(found.damaged) == ["step_000004"] and found.damaged["step_000004"].startswith(problem)
    write_record(LocalFolder(storage), found)
    assert rays_own_reading(storage) == (["step_000002"], "step_000002")


def test_changed_contents_are_seen_when_all_is_read(storage: Path) -> None:
    file = storage / "step_000004" / "actor" / "engine" / "model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    file.write_bytes(data)
    assert steps(storage, full=False) == [4, 2]
    assert steps(storage) == [2]


def test_one_that_ray_train_has_not_heard_of_counts(storage: Path) -> None:
    """Its workers died between giving it its name and reporting it; before, the run went back to step 2."""
    leave_checkpoint(storage, 6)
    record = json.loads((storage / RECORD).read_text())
    del record["checkpoint_results"][-1]
    record["latest_checkpoint_result"] = record["checkpoint_results"][-1]
    (storage / RECORD).write_text(json.dumps(record))
    assert newest_step(LocalFolder(storage)) == 4
    write_record(LocalFolder(storage), search(LocalFolder(storage)))
    assert newest_step(LocalFolder(storage)) == 6


def test_what_lies_elsewhere_belongs_to_it(storage: Path) -> None:
    """A critic in a separate trainer saves outside the actor's checkpoints."""
    run = storage.parent
    critics = [leave_checkpoint(run / "critic", step) for step in (6, 8)]
    for step in (6, 8):
        leave_checkpoint(storage, step, elsewhere=(f"../critic/step_{step:06d}",))
    assert steps(storage) == [8, 6, 4, 2]
    cut(critics[1] / "state.json")
    assert "critic/step_000008: state.json has" in search(LocalFolder(storage)).damaged["step_000008"]
    (critics[0] / manifest.MANIFEST).unlink()
    found = search(LocalFolder(storage))
    assert [whole.step for whole in found.whole] == [4, 2]
    assert "critic/step_000006, which belongs to it, has no manifest" in found.damaged["step_000006"]


def test_checkpoints_of_a_version_without_manifests(storage: Path) -> None:
    """They are taken when nothing is cut; a folder that Ray Train has not committed was never finished."""
    for step in (2, 4):
        (storage / f"step_{step:06d}" / manifest.MANIFEST).unlink()
    (storage / "step_000006").mkdir()
    found = search(LocalFolder(storage), full=True)
    assert [(whole.step, whole.has_manifest) for whole in found.whole] == [(4, False), (2, False)]
    assert found.whole[0].metrics == {"step": 4, "first_prompt_batch": 4, "fixed": {}} and not found.damaged
    cut(storage / "step_000004" / "actor" / "engine" / "model_states.pt")
    assert search(LocalFolder(storage)).damaged == {
        "step_000004": "actor/engine/model_states.pt is truncated, or not a tensor file"
    }
    # Without Ray Train's record it is unknown which checkpoints were finished, and what a checkpoint was
    # trained with.
    (storage / RECORD).unlink()
    found = search(LocalFolder(storage))
    assert [whole.metrics for whole in found.whole] == [{"step": 2, "first_prompt_batch": 2}]
    assert found.damaged.keys() == {"step_000004", "step_000006"}
    assert "state.json cannot be read" in found.damaged["step_000006"]


def test_checkpoints_of_a_version_that_says_first_draw(storage: Path) -> None:
    leave_checkpoint(storage, 6, first="first_draw")
    assert newest_step(LocalFolder(storage)) == newest_first_prompt_batch(LocalFolder(storage)) == 6
    assert steps(storage) == [6, 4, 2]
    # Without Ray Train's record its manifest says it, and without a manifest its state.
    (storage / RECORD).unlink()
    write_record(LocalFolder(storage), search(LocalFolder(storage)))
    assert newest_step(LocalFolder(storage)) == newest_first_prompt_batch(LocalFolder(storage)) == 6
    (storage / RECORD).unlink()
    (storage / "step_000006" / manifest.MANIFEST).unlink()
    found = search(LocalFolder(storage))
    assert found.whole[0].metrics == {"step": 6, "first_prompt_batch": 6}


def test_the_record_of_another_ray_is_made_again(storage: Path) -> None:
    record = storage / RECORD
    record.write_text(record.read_text().replace(ray.__version__, "2.59.0"))
    write_record(LocalFolder(storage), search(LocalFolder(storage)))
    assert json.loads(record.read_text())["ray_version"] == ray.__version__


def test_a_sound_record_is_left_alone(storage: Path) -> None:
    before = (storage / RECORD).stat()
    write_record(LocalFolder(storage), search(LocalFolder(storage)))
    assert (storage / RECORD).stat() == before
