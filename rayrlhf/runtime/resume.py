"""Selects the checkpoint to resume from, and refuses to resume with changed data, model, reward or batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from rayrlhf.config.common import JobConfig
from rayrlhf.runtime.fingerprint import without_operational_keys
from rayrlhf.runtime.preflight import InputError
from rayrlhf.storage.folder import Folder, run_folder
from rayrlhf.train.checkpoint import TRAIN_FOLDER
from rayrlhf.train.find import Found, Search, search, write_record

SAMPLES, SAMPLE_BYTES = 64, 2**16  # of a large file, for its fingerprint
Say = Callable[[str], None]

# Config keys that must not change when a run is resumed, and the entry of run.allow_changes that permits a
# change. None: never, because the checkpoint's states and its position in the data depend on the key. All
# other keys may change: the learning rate and its schedule, the number of steps and of workers, loss
# coefficients, sampling, micro-batches, evaluation, checkpoints, placement, observation.
FIXED: dict[str, str | None] = {
    "job": None,
    "train.zero_stage": None,
    "model.dtype": None,
    "model.lora.rank": None,
    "model.lora.alpha": None,
    "model.lora.target_modules": None,
    "model.quantization": None,
    "rollout.prompts_per_step": None,
    "rollout.group_size": "batch",
    "train.samples_per_step": "batch",
    "train.tokens_per_step": "batch",
    "train.fill_micro_batches": "batch",
    "train.max_tokens_per_micro_batch": "batch",  # only where the order of the rows depends on it, …
    "train.num_workers": "batch",  # … as on this
    "run.seed": "seed",
    "data.train": "data",  # the prepared rows, in order
    "data.ptx": "data",
    "data.shuffle": "data",
    "model.path": "model",
    "critic.path": "model",
    "ref.path": "model",
    "teacher.path": "model",
    "reward.sources": "reward",
}
OF_ORDER = ("train.max_tokens_per_micro_batch", "train.num_workers")
PREPARED = ("data.train", "data.ptx")  # known when the data have been read
PATHS = ("model.path", "critic.path", "ref.path", "teacher.path")
# A version that kept no others; what it did not keep cannot be compared.
FIRST_KEYS = (*list(FIXED)[1:8], "train.samples_per_step")


def fixed_values(config: JobConfig, prepared: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What this run can only be resumed with, by key. `prepared`: the fingerprints of its data by key.

    Where contents matter and not their name, the value is `{"name": …, "contents": fingerprint}`.
    """
    found: dict[str, Any] = {}
    for key in FIXED:
        section, _, name = key.rpartition(".")
        value = _value(config, key.split("."))
        if key == "reward.sources" and value is not None:
            value = [without_operational_keys(source.model_dump(mode="json")) for source in value]
        elif key in PATHS and value is not None:
            value = {"name": value, "contents": model_fingerprint(value)}
        elif key in PREPARED:
            value = _prepared(config, section, name, prepared or {})
        elif key == "train.fill_micro_batches":
            value = value or None  # false is what a checkpoint without this key means
        elif key in OF_ORDER and name not in getattr(_value(config, ["train"]), "order_depends_on", ()):
            value = None
        if value is not None:
            found[key] = value
    return json.loads(json.dumps(found))


def _value(section: Any, path: Sequence[str]) -> Any:
    for name in path:
        section = getattr(section, name, None)
    return section


def _prepared(config: Any, section: str, name: str, prepared: Mapping[str, str]) -> Any:
    contents = prepared.get(f"{section}.{name}")
    if contents is None:
        return None
    sources = getattr(config.data, name)
    sources = getattr(sources, "sources", sources)
    return {"name": ", ".join(source.path for source in sources), "contents": contents}


def model_fingerprint(path: str) -> str | None:
    """Fingerprint of a folder's config and weights, independent of its name; None if `path` is not a folder.

    Only samples of the weights are read: two models differ nearly everywhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = xxhash.xxh3_64()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            _add_samples(file, digest)
    return digest.hexdigest()


def _add_samples(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(opened.read())
            return
        for index in range(SAMPLES):
            opened.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))


def check_resume(config: JobConfig) -> None:
    """Check `run.resume` and whether the newest checkpoint can be resumed with this config.

    Raises:
        InputError: for a checkpoint that cannot be resumed, or any checkpoint with `run.resume=never`.
    """
    found = search(_storage(config))
    _check_policy(config, found)
    if found.newest is not None:
        check_same(config, found.newest)


def select_checkpoint(config: JobConfig, say: Say) -> Found | None:
    """Find the newest intact checkpoint, with every file verified; None if there are no checkpoints.

    Prints a warning for each newer one that is damaged, removes older damaged ones, and rewrites Ray Train's
    record so that it resumes from the same checkpoint.

    Raises:
        InputError: when there are checkpoints and none is intact.
    """
    storage = _storage(config)
    found = search(storage, full=True, say=say)
    _check_policy(config, found)
    newest = found.newest
    later = {name: why for name, why in found.damaged.items() if newest is None or name > newest.folder.name}
    for name, why in later.items():
        say(f"warning: checkpoint {name} is damaged: {why}")
    if found.record_problem:
        say(f"warning: Ray Train's {found.record_problem}; it is rewritten from the checkpoints")
    if newest is not None and not newest.has_manifest:
        say(f"warning: checkpoint {newest.folder.name} has no checksums: its contents cannot be checked")
    if newest is not None and (later or found.record_problem):
        say(f"resuming from step {newest.step}, the newest intact checkpoint")
    for name in found.damaged.keys() - later.keys():  # superseded by a newer one
        storage.remove(name)
    if storage.exists():
        write_record(storage, found)
    return newest


def check_unchanged(
    config: JobConfig, newest: Found | None, prepared: Mapping[str, str], say: Say
) -> dict[str, Any]:
    """Compare the config and data with those of the `newest` checkpoint; print the changes that are allowed.

    Returns:
        The values by key with which alone the run can be resumed from now on.

    Raises:
        InputError: for changes that `run.allow_changes` does not permit.
    """
    if newest is not None:
        for changed in (*check_same(config, newest), *check_same(config, newest, prepared)):
            say(f"changed since step {newest.step}: {changed}")
    return fixed_values(config, prepared)


def check_same(config: JobConfig, found: Found, prepared: Mapping[str, str] | None = None) -> list[str]:
    """The permitted changes since the checkpoint was saved. Raises `InputError` naming the others. With
    `prepared`, compares only the data.
    """
    saved = found.metrics.get("fixed")
    if saved is None:
        if any(name.endswith("/layout.json") for name in found.folder.sizes()):
            return [f"the settings of {found.folder.name} are not recorded, so they are not compared"]
        raise InputError(
            f"the checkpoint of step {found.step} in {config.run.place} was saved by an earlier version, "
            "which this one cannot resume. Fix: choose another run.name, and start from that run's export"
        )
    now = fixed_values(config, prepared)
    keys = FIXED if found.has_manifest else [key for key in FIXED if key in saved or key in FIRST_KEYS]
    changed = {
        key: f"{key}: was {_shown(saved.get(key))}, is {_shown(now.get(key))}"
        for key in keys
        if (key in PREPARED) == (prepared is not None) and not _equal(saved.get(key), now.get(key))
    }
    refused = [key for key in changed if FIXED[key] not in config.run.allow_changes]
    if refused:
        raise InputError(
            f"{config.run.place} holds a checkpoint of step {found.step} that was trained with other "
            "settings:\n" + "\n".join(f"  {changed[key]}. Fix: {_fix(key)}" for key in refused)
        )
    return list(changed.values())


def _fix(key: str) -> str:
    name = FIXED[key]
    allowed = "" if name is None else f"set run.allow_changes=[{name}] to resume nevertheless, "
    return f"restore {key}, {allowed}or choose another run.name"


def _equal(saved: Any, now: Any) -> bool:
    both = isinstance(saved, dict) and isinstance(now, dict)
    if both and saved.get("contents") and now.get("contents"):
        return saved["contents"] == now["contents"]
    return saved == now


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "contents" in value:
        contents = value["contents"]
        return value["name"] + (f" (contents {contents[:8]})" if contents else "")
    return json.dumps(value, ensure_ascii=False)


def _check_policy(config: JobConfig, found: Search) -> None:
    path = config.run.place
    if config.run.resume == "never" and (found.whole or found.damaged):
        step = "damaged checkpoints" if found.newest is None else f"a checkpoint of step {found.newest.step}"
        raise InputError(
            f"run.resume=never but {path} holds {step}; "
            "choose another run.name, delete the folder, or set run.resume=auto"
        )
    if found.damaged and found.newest is None:
        raise InputError(
            f"no checkpoint in {_storage(config)} is intact:\n"
            + "\n".join(f"  {name}: {why}" for name, why in found.damaged.items())
            + "\nFix: restore an intact one, choose another run.name, or delete that folder to start over"
        )


def _storage(config: JobConfig) -> Folder:
    return run_folder(config.run, TRAIN_FOLDER)
