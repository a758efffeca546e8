"""Serve deployments of a run's reward sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.config.reward import RewardConfig
from rayrlhf.placement.slots import Slots
from rayrlhf.reward.functions import function_deployment, hosted_function
from rayrlhf.reward.model_deployment import model_deployment
from rayrlhf.reward.reading import PromptFormat
from rayrlhf.reward.remote import remote_deployment
from rayrlhf.reward.verifiable import verifiable_deployment
from rayrlhf.usercode import UserCode, log_of

RewardApp = tuple[str, float, str]  # source name, weight, Serve app ("" if it needs none)


def reward_app_names(reward: RewardConfig, run_id: str) -> tuple[RewardApp, ...]:
    named = enumerate(zip(reward.source_names, reward.sources, strict=True))
    return tuple(
        (name, source.weight, "" if source.type == "environment" else f"{run_id}-reward{index}")
        for index, (name, source) in named
    )


def reward_apps(
    reward: RewardConfig,
    names: Sequence[RewardApp],
    functions: dict[int, UserCode],
    *,
    prompt_format: PromptFormat,
    label_key: str | None,
    slots: Slots,
    run_path: Path | str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """App name -> bound deployment of every reward source that has one. The output of functions is logged in
    the run's folder, its first lines go to `say`.
    """
    apps: dict[str, Any] = {}
    for index, (source, (name, _, app)) in enumerate(zip(reward.sources, names, strict=True)):
        match source.type:
            case "function":
                apps[app] = function_deployment(
                    hosted_function(functions[index], source, reward.timeout_seconds),
                    label_key=label_key,
                    num_replicas=source.num_replicas,
                    name=name,
                    log=log_of(run_path, f"reward-{name}"),
                    say=say,
                )
            case "model":
                apps[app] = model_deployment(
                    source,
                    role=f"reward:{index}",
                    prompt_format=prompt_format,
                    slots=slots,
                )
            case "remote":
                apps[app] = remote_deployment(source, label_key=label_key)
            case "math" | "reasoning_gym":
                apps[app] = verifiable_deployment(source, label_key=label_key)
            case "environment":  # its rewards are part of the samples
                pass
    return apps
