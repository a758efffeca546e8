"""Models of the Hugging Face hub, on the driver: pin ids, fetch models, share the token with workers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import yaml
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.config.model_paths import model_paths
from rayrlhf.data.sources.hub_pins import pin_data
from rayrlhf.hub.access import access_from_env
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.ids import cache_folder, names_a_cache, parse_id, pinned_id
from rayrlhf.hub.local import ACTOR_PREFIX, HubSettings, HubSettingsActor, local_folder
from rayrlhf.hub.resolve import no_folder, resolve
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.slots import PlacementError, Slots
from rayrlhf.runtime.preflight import InputError

C = TypeVar("C", bound=Any)
Say = Callable[[str], None]

POLL_SECONDS = 1.0
ANSWER_SECONDS = 300.0  # for an actor to start and answer


def pin(config: C, say: Say) -> C:
    """Pin every hub id of the config to a commit, and fetch the models' small files, which later checks read,
    into this node's cache. A resumed run keeps the commits that it started with, except for ids that name a
    revision.

    Raises:
        InputError: naming every key whose path is neither a folder nor an id, or whose id is unavailable.
    """
    started_with = _started_with(config)
    pins: dict[str, str] = {}
    problems: list[str] = []
    for key, path in model_paths(config):
        if Path(path).is_dir():
            continue
        hub_id = parse_id(path)
        if isinstance(hub_id, str):
            problems.append(no_folder(key, path, hub_id))
            continue
        earlier = pinned_id(_earlier_path(started_with, key))
        if earlier is not None and earlier.repo != hub_id.repo:
            earlier = None
        if earlier is not None and hub_id.revision is None:
            hub_id = earlier
        needs_tokenizer = key in ("model.path", "teacher.path") or key.startswith("reward.")
        try:
            pinned = resolve(
                hub_id, access_from_env(), cache_folder(os.environ), say=say, needs_tokenizer=needs_tokenizer
            )
        except HubError as error:
            problems.append(f"{key}={path}: {error}")
            continue
        if earlier is not None and pinned != earlier:
            say(f"warning: {key} is {pinned}, but the run started with {earlier}")
        pins[key] = str(pinned)
    config = with_paths(config, pins)
    if getattr(config, "data", None) is not None:
        data = pin_data(config.data, started_with.get("data"), say, problems)
        config = config.model_copy(update={"data": data})
    if problems:
        raise InputError("\n".join(problems))
    return config


def _started_with(config: Any) -> dict[str, Any]:
    """The config.yaml that an earlier start of this run wrote; empty if there is none."""
    run = getattr(config, "run", None)
    file = None if run is None else Path(run.path) / "config.yaml"
    if file is None or not file.is_file():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # it will be rewritten
    return tree if isinstance(tree, dict) else {}


def _earlier_path(tree: dict[str, Any], key: str) -> str:
    found: Any = tree
    for name in key.split("."):
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


def with_paths(config: C, paths: dict[str, str]) -> C:
    """The config with these model paths, by key."""
    changes: dict[str, Any] = {}
    sources = list(config.reward.sources) if getattr(config, "reward", None) is not None else []
    for key, path in paths.items():
        first, *rest = key.split(".")
        if first == "reward":
            index = int(rest[1])
            sources[index] = sources[index].model_copy(update={"path": path})
            changes["reward"] = config.reward.model_copy(update={"sources": sources})
        else:
            changes[first] = getattr(config, first).model_copy(update={"path": path})
    return config.model_copy(update=changes) if changes else config


def fetch_here(config: Any, say: Say) -> None:
    """Fetch the pinned models completely into this node's cache, except for a job on a cluster: there the
    nodes that load a model fetch it, and the driver's node may not be one of them. Raises `HubError`.
    """
    if os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        return
    for _, path in model_paths(config):
        local_folder(path, say=say)


@contextmanager
def shared_access(config: Any) -> Iterator[None]:
    """While the body runs, processes of this cluster can fetch the pinned models with the driver's access."""
    ids = frozenset(path for _, path in model_paths(config) if pinned_id(path) is not None)
    if not ids:
        yield
        return
    name = f"{ACTOR_PREFIX}{uuid.uuid4().hex[:12]}"
    settings_actor: Any = (
        ray.remote(HubSettingsActor).options(name=name, namespace=NAMESPACE, num_cpus=0).remote()
    )
    settings = HubSettings(access_from_env(), str(cache_folder(os.environ)), names_a_cache(os.environ))
    ray.get(settings_actor.set.remote(settings, ids), timeout=ANSWER_SECONDS)
    try:
        yield
    finally:
        ray.kill(settings_actor)


def fetch_on_nodes(config: Any, slots: Slots, say: Say) -> None:
    """Fetch on every node the models that its slots will load, before the start deadlines of their roles
    begin. Raises `PlacementError` for a node that cannot.
    """
    paths = {key: path for key, path in model_paths(config) if pinned_id(path) is not None}
    wanted: dict[str, set[str]] = {}
    for plan in slots.spec.roles:
        needed = {path for key, path in paths.items() if _is_loaded_by(plan.role, key)}
        for slot in {slot for unit in plan.units for slot in unit} if needed else ():
            wanted.setdefault(slots.table[slot].node, set()).update(needed)
    fetching: dict[Any, tuple[str, Any]] = {}
    for node, needed in wanted.items():
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        actor: Any = (
            ray.remote(_Fetcher).options(num_cpus=0, max_concurrency=2, scheduling_strategy=affinity).remote()
        )
        fetching[actor.fetch.remote(sorted(needed))] = node, actor
    try:
        while fetching:
            ready, _ = ray.wait(list(fetching), timeout=POLL_SECONDS)
            for node, actor in fetching.values():  # after the wait: finished ones add no lines
                for line in ray.get(actor.take_lines.remote(), timeout=ANSWER_SECONDS):
                    say(f"{line} on node {node[:6]}")
            for ref in ready:
                node, actor = fetching.pop(ref)
                if problem := ray.get(ref):
                    raise PlacementError(f"node {node[:6]}: {problem}")
                ray.kill(actor)
    except RayError as error:
        raise PlacementError(
            f"a node died, or did not answer for {ANSWER_SECONDS:g} s, while it fetched models: {error}"
        ) from error
    finally:
        for _, actor in fetching.values():
            ray.kill(actor)


def _is_loaded_by(role: str, key: str) -> bool:
    """Whether a unit of the role may load the model of that key; trainers may hold all but reward models."""
    if role.startswith("reward:"):
        return key == f"reward.sources.{role.removeprefix('reward:')}.path"
    return key == "model.path" if role == "rollout" else not key.startswith("reward.")


class _Fetcher:
    """Actor that fetches models on its node; its progress lines can be read meanwhile."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def fetch(self, paths: list[str]) -> str:
        """Fetch these models; returns the error message, or an empty string."""
        try:
            for path in paths:
                local_folder(path, say=lambda line: self.lines.append(line))
        except HubError as error:
            return str(error)
        return ""

    def take_lines(self) -> list[str]:
        """The progress lines since the last call."""
        lines, self.lines = self.lines, []
        return lines
