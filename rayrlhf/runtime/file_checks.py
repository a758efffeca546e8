"""Checks of a job's files and folders, before heavy imports.

A job's script loads its config with `load_job`. Drivers repeat the checks, for callers that build their
config in Python.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rayrlhf.capacity.attention_heads import split_problems
from rayrlhf.capacity.model_shape import ShapeUnknown, read_shape
from rayrlhf.config.base import ConfigError, Problem, Section
from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import ExampleDataConfig
from rayrlhf.config.parse import load_or_exit
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.checks import check_example_sources, check_sources
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import Split, resolve_source
from rayrlhf.models.folder import Kind, folder_problems, has_chat_template, reader_problems
from rayrlhf.models.weight_files import BrokenFile
from rayrlhf.runtime.length_checks import length_problems, length_warnings
from rayrlhf.storage.folder import RemoteFolder
from rayrlhf.storage.urls import has_credentials, without_credentials

S = TypeVar("S", bound=Section)
MIN_FREE_BYTES = 64 * 2**20  # for logs and metrics; an export needs the model's size in addition
WRITE_TEST = ".write-test"
ROOM_FOR_NAMES = 512  # in a run's folder, in bytes
NEW_HEADS = ("rm", "prm")  # jobs that start from a language model or a reward model


def load_job(schema: type[S], argv: Sequence[str]) -> S:
    """Load the config and check its files; on problems, print them to stderr and exit with code 2."""
    config = load_or_exit(schema, argv)
    try:
        check_files(config)
        for warning in length_warnings(config, _readers(config)):
            print(f"warning: {warning}", file=sys.stderr)
        _check_data(config)
    except (ConfigError, DataError) as error:
        print(error if isinstance(error, ConfigError) else f"error {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def check_files(config: Any) -> None:
    """Check the run's folder and the models on this machine. Raises `ConfigError` with all problems."""
    problems = list(_run_folder(config))
    trust = getattr(getattr(config, "model", None), "trust_remote_code", False)
    for key, path, kind in model_folders(config):
        if Path(path).is_dir():  # hub ids are checked by `hub_models.pin`
            tokenizer = key in ("model.path", "teacher.path") or kind == "scorer"
            problems += folder_problems(key, path, kind, trust_remote_code=trust, needs_tokenizer=tokenizer)
        elif (
            path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") > 1
        ):  # a revision may have some
            fix = f"give the path of a Hugging Face checkpoint folder; it was looked up from {Path.cwd()}"
            problems.append(
                Problem(key, f"{path}: no such folder", "a folder, or a hub id (owner/name)", fix)
            )
    if not problems:
        problems += [*_chat_template(config), *_heads(config), *length_problems(config, _readers(config))]
        problems += _unknown_tokens(config)
    if problems:
        raise ConfigError(problems)


def _check_data(config: Any) -> None:
    """Check the first rows of the data files, unless that needs the hub. Raises `DataError`."""
    data: Any = getattr(config, "data", None)
    if not isinstance(data, PromptDataConfig | ExampleDataConfig) or _needs_datasets(data):
        return
    if isinstance(data, PromptDataConfig):
        check_sources(data)
    else:
        check_example_sources(data)


def _needs_datasets(data: PromptDataConfig | ExampleDataConfig) -> bool:
    """Whether a source is a saved data set or one of the hub: these need a library that takes seconds to
    import.
    """
    splits: list[tuple[Split, Any]] = [("train", data.train), ("eval", data.eval)]
    for split, sources in splits:
        for source in sources:
            try:
                files = resolve_source(source.path, split, getattr(data, f"{split}_split", None))
            except DataError:
                continue  # reported by the check itself
            if any(file.type in ("hub", "dataset") for file in files):
                return True
    return False


def model_folders(config: Any) -> Iterator[tuple[str, str, Kind]]:
    """(key, path, required kind) of every model that a job names, for any kind of job."""
    if (model := getattr(config, "model", None)) is not None:
        yield "model.path", model.path, "start" if getattr(config, "job", None) in NEW_HEADS else "policy"
    others: tuple[tuple[str, Kind], ...] = (("critic", "start"), ("ref", "policy"), ("teacher", "policy"))
    for section, kind in others:
        part = getattr(config, section, None)
        if part is not None and part.path is not None:
            yield f"{section}.path", part.path, kind
    reward = getattr(config, "reward", None)
    for index, source in enumerate(reward.sources if reward is not None else ()):
        if source.type == "model":
            yield f"reward.sources.{index}.path", source.path, "scorer"


def _unknown_tokens(config: Any) -> Iterator[Problem]:
    """Problems of models that must read the tokens of model.path's tokenizer."""
    policy = getattr(getattr(config, "model", None), "path", "")
    if Path(policy).is_dir():
        for key, path in _readers(config):
            if key in ("critic.path", "ref.path", "teacher.path"):
                yield from reader_problems(key, path, policy)


def _readers(config: Any) -> list[tuple[str, str]]:
    """Key and folder of the models on this machine that read the job's sequences."""
    return [(key, path) for key, path, _ in model_folders(config) if (Path(path) / "config.json").is_file()]


def _chat_template(config: Any) -> Iterator[Problem]:
    """Missing chat template of a job that renders all its prompts with one (data.apply_chat_template)."""
    is_rendered = isinstance(config, PolicyRunConfig) or hasattr(config, "rollout")
    data = getattr(config, "data", None)
    if not is_rendered or data is None or not data.apply_chat_template or data.chat_template is not None:
        return
    if getattr(data, "response_key", None) is not None or not Path(config.model.path).is_dir():
        return
    try:
        found = has_chat_template(config.model.path)
    except BrokenFile as error:
        yield Problem("model.path", str(error), "a whole tokenizer", "save it again")
        return
    if not found:
        yield Problem(
            "data.apply_chat_template",
            got=f"true, but the tokenizer in {config.model.path} has no chat template",
            wanted="a template to render prompts with",
            fix="name one with data.chat_template, or set data.apply_chat_template=false",
        )


def _heads(config: Any) -> list[Problem]:
    """Attention heads that do not divide over an engine's GPUs, if the model's shape is known locally."""
    try:
        return list(split_problems(config, read_shape))
    except ShapeUnknown:
        return []  # reported by the plan


def _run_folder(config: Any) -> Iterator[Problem]:
    """Problems of the run's folder: not a folder, not writable, name too long, disk full."""
    run = getattr(config, "run", None)
    if run is None:
        return
    if "\0" in run.dir or run.dir.startswith("~"):
        yield Problem(
            "run.dir",
            got=repr(run.dir),
            wanted="a folder's path (~ is not expanded), or a URL",
            fix="write the path in full",
        )
        return
    if run.url is not None:
        yield from _run_url(config, run.url)
    path = Path(run.path).absolute()
    try:
        existing = path
        while not os.path.exists(existing):  # False if a name is too long
            existing = existing.parent
        if not existing.is_dir():
            wanted = "a folder, or a path where one can be made"
            yield Problem("run.dir", f"{existing} is a file", wanted, "choose another run.dir")
            return
        if (too_long := _too_long(path, existing)) is not None:
            yield too_long
            return
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        got, wanted = f"{path!s:.120}: {error.strerror}", "a folder that can be written to"
        yield Problem("run.dir", got, wanted, "make it writable, or choose another run.dir")
        return
    needed, free = MIN_FREE_BYTES + _export_bytes(config), shutil.disk_usage(existing).free
    if free < needed:
        yield Problem(
            "run.dir",
            got=f"{existing} has {free / 2**30:.1f} GiB free",
            wanted=f"{needed / 2**30:.1f} GiB at least, for the export and the logs",
            fix="make room, or choose a run.dir on another disk",
        )


def _run_url(config: Any, url: str) -> Iterator[Problem]:
    """Problems of a run's folder in an object store."""
    if hasattr(config, "num_rounds"):
        yield Problem(
            "run.dir",
            got=config.run.dir,
            wanted="a folder that all nodes share: a round trains the model that the one before has written",
            fix="mount such storage and name its path",
        )
        return
    if has_credentials(url):
        yield Problem(
            "run.dir",
            got=without_credentials(config.run.dir),
            wanted="a URL without credentials, which the run would write into its folder",
            fix="set them in the environment (AWS_ACCESS_KEY_ID, …) or in the provider's own file",
        )
        return
    try:
        folder = RemoteFolder(url)
        folder.write(WRITE_TEST, "")
        folder.remove(WRITE_TEST)
    except (OSError, ValueError, ImportError) as error:
        yield Problem(
            "run.dir",
            got=f"{config.run.dir}: {error!s:.300}",
            wanted="a bucket that can be written to, of a known scheme",
            fix="check the name, the credentials in the environment and, for other servers than the "
            "provider's own, AWS_ENDPOINT_URL",
        )


def _too_long(path: Path, existing: Path) -> Problem | None:
    longest, whole = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    sizes = [len(os.fsencode(part)) for part in path.parts]
    size = sum(sizes) + len(sizes)
    if max(sizes) <= longest and size + ROOM_FOR_NAMES <= whole:
        return None
    key = "run.name" if sizes[-1] > longest or sizes[-1] * 2 > size else "run.dir"
    wanted = f"names of at most {longest} bytes and at most {whole - ROOM_FOR_NAMES} in all"
    return Problem(key, f"{path!s:.60}… of {size} bytes", wanted, f"shorten {key}")


def _export_bytes(config: Any) -> int:
    checkpoint, model = getattr(config, "checkpoint", None), getattr(config, "model", None)
    if checkpoint is None or not checkpoint.export or model is None or model.lora is not None:
        return 0
    return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors") if file.is_file())
