"""Inputs of all launchers: the job's command, its config as a file, its environment."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from rayrlhf.capacity.deadlines import deadlines_left_out
from rayrlhf.capacity.micro_batch import keys_sized_by_plan
from rayrlhf.commands.render.sizing import Nodes, nodes_of
from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.job_kinds import script_of
from rayrlhf.config.parse import dump_resolved
from rayrlhf.config.yaml_tree import read_tree
from rayrlhf.placement.plan import slots_in_words
from rayrlhf.secrets import is_secret_name, secrets_in
from rayrlhf.storage.urls import is_url

ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=([^\s;]+)")  # in a line of shell
EXCLUDED = ("/.venv/", "/.git/", "/runs/", "/models/", "wandb/")  # of an uploaded working directory


@dataclass(frozen=True)
class Rendering:
    """A job with all that launchers need."""

    config: Any
    argv: tuple[str, ...]  # files and overrides, as on the command line
    nodes: Nodes

    @property
    def name(self) -> str:
        """The run's name, reduced to what Kubernetes allows."""
        cleaned = "".join(c if c.isalnum() else "-" for c in self.config_name.lower()).strip("-")
        return cleaned[:47] or "rayrlhf"

    @property
    def config_name(self) -> str:
        run = getattr(self.config, "run", None)
        return run.name if run is not None else self.config.job

    @property
    def command(self) -> str:
        """As typed in the repository."""
        return shlex.join(["python", script_of(self.config), *self.argv])

    def command_with(self, config_path: str, *overrides: str) -> str:
        return shlex.join(["python", script_of(self.config), config_path, *overrides])

    @property
    def resolved(self) -> str:
        """The whole config, without the values that only launchers read, and without those that were left out
        for the driver to set.
        """
        config, on_gpu = self.config, self.nodes.gpus > 0
        left = [*keys_sized_by_plan(config, on_gpu=on_gpu), *deadlines_left_out(config)]
        return dump_resolved(config.model_copy(update={"launch": type(config.launch)()}), without=left)

    def run_dir(self, root: str) -> list[str]:
        """An override that puts a relative run.dir under storage that all nodes share."""
        run = getattr(self.config, "run", None)
        if run is None or run.dir.startswith("/") or is_url(run.dir):
            return []
        return [f"run.dir={root.rstrip('/')}/{run.dir}"]

    @property
    def env(self) -> dict[str, str]:
        return self.config.launch.env

    @property
    def secrets(self) -> dict[str, tuple[str, str]]:
        """Variables with the name and the key of the secret that holds each; the key is the variable's name
        unless it is given.
        """
        given = self.config.launch.env_from_secret
        parts = {variable: reference.partition("/") for variable, reference in given.items()}
        return {variable: (name, key or variable) for variable, (name, _, key) in parts.items()}

    def header(self, where: str = "") -> list[str]:
        """Comment lines: where the file comes from and what was assumed. `where`: instead of nodes."""
        nodes = self.nodes
        what = f"{nodes.gpus} GPUs" if nodes.gpus else f"{nodes.cpus} CPUs"
        where = where or f"{nodes.count} node{'s' * (nodes.count > 1)} of {what}"
        lines = [
            f"Rendered from {' '.join(self.argv)} by `rayrlhf render`; change that, then render again.",
            f"{slots_in_words(nodes.num_slots)} on {where}.",
        ]
        return lines + ([nodes.assumed + "."] if nodes.assumed else [])


def rendering_of(config: Any, argv: list[str]) -> Rendering:
    """Raises `ConfigError` for a literal secret: a rendered file is committed, mailed and stored."""
    config_tree = config.model_dump(mode="json")
    places = secrets_in(config_tree)
    setup = ((config_tree.get("launch") or {}).get("slurm") or {}).get("setup") or []
    for index, line in enumerate(setup):
        for name, value in ASSIGNMENT.findall(line):
            if is_secret_name(name) and not value.startswith("$"):
                places[f"launch.slurm.setup.{index}"] = value
    if places:
        raise ConfigError([_secret_at(path) for path in places])
    return Rendering(config, tuple(argv), nodes_of(config))


def _secret_at(path: str) -> Problem:
    if path.startswith("launch."):
        fix = "set the variable where the launcher runs"
    elif ".arguments" in path:
        fix = "remove it, and have your class read an environment variable"
    else:
        fix = "write ${VARIABLE} in its place, and set the variable where the job runs"
    return Problem(path, "a secret", "none: it would be written to the rendered file", fix)


def commented(lines: list[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: Any) -> str:
    """YAML with keys in their order, and strings of several lines as blocks."""
    return "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)
        for document in documents
    )


def paths_of(argv: tuple[str, ...]) -> dict[str, str]:
    """Keys of the files that hold local paths, with the paths: a submitted job runs in an uploaded copy of
    the repository, without the files that .gitignore excludes.
    """
    tree: Any = read_tree(argv).values
    found: dict[str, str] = {}
    for section, key in (("model", "path"), ("critic", "path"), ("ref", "path"), ("teacher", "path")):
        value = (tree.get(section) or {}).get(key)
        if isinstance(value, str):
            found[f"{section}.{key}"] = value
    for key in ("train", "eval"):
        value = (tree.get("data") or {}).get(key)
        if isinstance(value, str):
            found[f"data.{key}"] = value
    for index, source in enumerate((tree.get("reward") or {}).get("sources", [])):
        if isinstance(source.get("path"), str):
            found[f"reward.sources.{index}.path"] = source["path"]
    return {key: path for key, path in found.items() if not is_url(path.rpartition("@")[2])}
