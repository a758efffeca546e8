"""Checks before Ray starts, in seconds rather than minutes: paths, data, reward functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.data import DataConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.reward_sources import ModelSource
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.checks import check_sources
from rayrlhf.data.ends import ends_of
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.store import PromptStore
from rayrlhf.environments.chat_tokens import Turns
from rayrlhf.environments.deployment import (
    NAME,
    find_environment,
    hosted_environment,
    try_environment,
)
from rayrlhf.environments.user_environment import EnvironmentFailure
from rayrlhf.hub.local import local_folder
from rayrlhf.isolation.output import OutputLog
from rayrlhf.models.weight_files import read_json
from rayrlhf.reward.functions import find_function, hosted_function, try_function
from rayrlhf.reward.items import RewardError
from rayrlhf.reward.reading import PromptFormat, Reading
from rayrlhf.reward.remote import check_reachable, resolved_source
from rayrlhf.reward.verifiable import check_installed, try_rows
from rayrlhf.samples import Prompt
from rayrlhf.usercode import UserCode, UserCodeError, log_of

TRIED_PROMPTS = 2
TRIED_LABELS = 32


class InputError(ValueError):
    """Unusable user input; the message names the key, the value and the fix."""


@dataclass(frozen=True)
class Prepared:
    reward_functions: dict[int, UserCode]  # by index of the source
    environment: UserCode | None = None


def check_before_ray(config: PolicyRunConfig) -> Prepared:
    """Check models, data sources and rewards. Raises `InputError`, `DataError` or `RewardError`."""
    for key, path in _model_paths(config):
        check_model(key, path)
    check_sources(config.data)
    return Prepared(find_rewards(config.reward), _find_environment(config))


def check_stops(model: ModelConfig, data: DataConfig, stops: Mapping[str, Sequence[str]]) -> None:
    """Raise `InputError` for stop strings that no engine could find. `stops`: config key -> stop strings."""
    ends = ends_of(model, data)
    for key, stop in stops.items():
        try:
            ends(stop)
        except DataError as error:
            raise InputError(f"{key}: {error}") from error


def find_rewards(reward: RewardConfig) -> dict[int, UserCode]:
    """Load the reward functions by source index, and check the requirements of other sources."""
    functions: dict[int, UserCode] = {}
    for index, source in enumerate(reward.sources):
        with _named(index, source.type):
            if source.type == "function":
                functions[index] = find_function(source.function, source, reward.timeout_seconds)
            elif source.type == "math" or source.type == "reasoning_gym":
                check_installed(source)
            elif source.type == "remote":
                resolved_source(source)
    return functions


@contextmanager
def _named(index: int, kind: str) -> Iterator[None]:
    """Prefix a `RewardError` of the body with its source's key."""
    key = f"reward.sources.{index}" + (".function" if kind == "function" else f" ({kind})")
    try:
        yield
    except RewardError as error:
        raise RewardError(f"{key}: {error}") from error


def _find_environment(config: PolicyRunConfig) -> UserCode | None:
    if config.rollout.environment is None:
        return None
    try:
        return find_environment(config.rollout.environment)
    except UserCodeError as error:
        raise InputError(f"rollout.environment.environment: {error}") from error


def try_out_environment(
    code: UserCode | None, config: PolicyRunConfig, prompts: PromptStore, say: Callable[[str], None]
) -> None:
    """Play the beginning of an episode on real rows, before any model is loaded.

    Args:
        say: receives the first lines that the environment prints.

    Raises:
        InputError: if the environment fails.
        DataError: if the chat template cannot continue a conversation.
    """
    environment = config.rollout.environment
    if code is None or environment is None:
        return
    tokenizer = prompt_tokenizer(
        config.model.path, config.model.trust_remote_code, read_chat_template(config.data)
    )
    rows = [prompt.columns for prompt in _first(prompts, TRIED_PROMPTS)]
    try:
        try_environment(
            hosted_environment(code, environment),
            OutputLog(NAME, log_of(config.run.path, NAME), say),
            environment,
            rows,
            Turns(tokenizer, config.data),
        )
    except EnvironmentFailure as error:
        raise InputError(f"rollout.environment: {error}") from error


def try_rewards(
    functions: dict[int, UserCode],
    reward: RewardConfig,
    label_key: str | None,
    prompts: PromptStore,
    run_path: str | Path,
    say: Callable[[str], None],
    *,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Try every reward source that can be tried before any model is loaded: call functions once on real
    prompts, read labels, connect to servers, and render prompts for reward models.

    Args:
        prompt_format: format of the policy's prompts, which reward models must be able to read.
        say: receives the first lines that functions print; all their output goes into the run's folder.

    Raises:
        RewardError: for a source that does not work.
    """
    for index, (source, name) in enumerate(zip(reward.sources, reward.source_names, strict=True)):
        with _named(index, source.type):
            if source.type == "function":
                hosted = hosted_function(functions[index], source, reward.timeout_seconds)
                output = OutputLog(name, log_of(run_path, f"reward-{name}"), say)
                try_function(hosted, output, _first(prompts, TRIED_PROMPTS), label_key)
            elif source.type == "math" or source.type == "reasoning_gym":
                try_rows(source, _first(prompts, TRIED_LABELS), label_key)
            elif source.type == "remote":
                for url in source.urls:
                    check_reachable(url)
            elif source.type == "model" and prompt_format is not None:
                _try_reading(source, prompt_format, _first(prompts, TRIED_LABELS))


def _try_reading(source: ModelSource, prompt_format: PromptFormat, prompts: list[Prompt]) -> None:
    """Raise `RewardError` if a model with another vocabulary than the policy's cannot read the prompts."""
    tokenizer = prompt_tokenizer(source.path)
    policy = prompt_tokenizer(prompt_format.tokenizer_path, prompt_format.trust_remote_code)
    config = read_json(Path(local_folder(source.path, weights=False)) / "config.json")
    try:
        reading = Reading.of(tokenizer, source.read_at, config)
        if tokenizer.get_vocab() == policy.get_vocab():
            return
        for prompt in prompts:
            reading.of_conversation(prompt.columns, prompt_format.data, "An answer.")
    except (BadRow, DataError) as error:
        raise RewardError(f"path={source.path}: {error}") from error


def _first(prompts: PromptStore, count: int) -> list[Prompt]:
    return [prompts[i] for i in range(min(count, len(prompts)))]


def with_absolute_paths(config: PolicyRunConfig) -> PolicyRunConfig:
    """The config with absolute paths of the run's and the models' folders, because workers have other working
    directories.
    """
    changes: dict[str, Any] = {"run": config.run.absolute()}
    for section in ("model", "critic", "ref"):
        part = getattr(config, section)
        if part is not None and part.path is not None:
            changes[section] = part.model_copy(update={"path": absolute(part.path)})
    changes["reward"] = absolute_rewards(config.reward)
    return config.model_copy(update=changes)


def absolute_rewards(reward: RewardConfig) -> RewardConfig:
    """The section with absolute paths of the reward models' folders."""
    sources = [
        source.model_copy(update={"path": absolute(source.path)}) if source.type == "model" else source
        for source in reward.sources
    ]
    return reward.model_copy(update={"sources": sources})


def absolute(path: str) -> str:
    """A folder's absolute path; a hub id is returned unchanged."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _model_paths(config: PolicyRunConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    if config.critic is not None and config.critic.path is not None:
        yield "critic.path", config.critic.path
    if config.ref is not None and config.ref.path is not None:
        yield "ref.path", config.ref.path
    yield from reward_model_paths(config.reward)


def reward_model_paths(reward: RewardConfig) -> Iterator[tuple[str, str]]:
    for index, source in enumerate(reward.sources):
        if source.type == "model":
            yield f"reward.sources.{index}.path", source.path


def check_model(key: str, path: str) -> None:
    """A local folder must hold a checkpoint; anything else must look like a hub id (`owner/name`)."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{key}={path}: the folder has no config.json; wanted a Hugging Face checkpoint folder"
            )
        return
    looks_like_hub_id = (
        path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.parent.is_dir()
    )
    if not looks_like_hub_id:
        raise InputError(
            f"{key}={path}: no such folder (looked from {Path.cwd()}); "
            "give the path of a Hugging Face checkpoint folder"
        )


def check_precision(config: Any, *, on_gpu: bool) -> None:
    """Check settings that depend on the dtype, and thereby on the devices. Raises `ConfigError`."""
    train = getattr(config, "train", None)
    if train is None:
        return
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    if dtype == "bfloat16" and train.zero_stage == 0:
        problem = Problem(
            "train.zero_stage",
            got=f"0 with model.dtype={config.model.dtype}" + " on GPUs" * on_gpu,
            wanted="1, 2 or 3: DeepSpeed's ZeRO-0 in bfloat16 takes other steps than AdamW",
            fix="set train.zero_stage to 1, which costs nothing, or model.dtype to float32",
        )
        raise ConfigError([problem])
    if dtype == "float32" and train.master_weights == "bfloat16":
        problem = Problem(
            "train.master_weights",
            got=f"bfloat16 with model.dtype={config.model.dtype}" + " on CPUs" * (not on_gpu),
            wanted="float32: masters are not shorter than the weights",
            fix="set model.dtype to bfloat16, or remove train.master_weights",
        )
        raise ConfigError([problem])


def check_kernels(config: Any, *, on_gpu: bool) -> None:
    """Check model.kernels and model.compile on CPUs: kernels must be built on this machine, whose image the
    workers have. What GPUs need is checked by each worker, as a head node often has none. Raises
    `ConfigError`.
    """
    if config.model.has_liger and not on_gpu:
        problem = Problem(
            "model.kernels",
            got="liger on CPUs",
            wanted="none: Liger's kernels are made for CUDA GPUs",
            fix="remove model.kernels; model.compile fuses operations on CPUs",
        )
        raise ConfigError([problem])
    keys = ["model.compile"] if config.model.compiles else []
    sources = enumerate(config.reward.sources if getattr(config, "reward", None) is not None else ())
    keys += [f"reward.sources.{i}.compile" for i, source in sources if getattr(source, "compile", False)]
    if on_gpu or not keys:
        return
    from rayrlhf.models.compiled_layers import why_not_compiled  # imports torch

    missing = why_not_compiled(on_gpu=False)
    if missing is not None:
        problems = [
            Problem(
                key,
                got=f"true, and this machine does not have {missing}",
                wanted="a compiler on every node of the run: torch.compile builds its kernels with it",
                fix=f"install what is missing (apt-get install g++ python3-dev), or set {key} to false",
            )
            for key in keys
        ]
        raise ConfigError(problems)
