"""Ids of the Hugging Face hub in a config, `owner/name` or `owner/name@revision`. No heavy imports here.

A config names a model by a folder or by an id. The driver pins an id once, before Ray starts: `owner/name`
becomes `owner/name@<40 hex digits>`, the commit. The pinned id is written to the run's config.yaml and sent
to the workers, which resolve it to a folder of their node's cache when they load something.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]

PREFIX = "hub@"  # marks an id explicitly, even if a folder of that name exists
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*")  # of an owner or of a repository
REVISION = re.compile(r"[A-Za-z0-9_](?:[\w./-])*")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST = 96  # max characters of owner/name


@dataclass(frozen=True)
class HubId:
    """`owner/name` at a revision: a branch, a tag, a commit, or None for the hub's default branch."""

    repo: str
    revision: str | None = None
    kind: Kind = "model"

    @property
    def is_pinned(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubId:
        return HubId(self.repo, commit, self.kind)

    @property
    def cache_name(self) -> str:
        """Folder name of this repository in a hub cache."""
        return f"{self.kind}s--{self.repo.replace('/', '--')}"

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_id(text: str) -> HubId | str:
    """The parsed id, or why `text` is none (end of a sentence: "… because it begins as a path does")."""
    explicit = text.startswith(PREFIX)
    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    if repo.startswith((".", "/", "~")):
        return "it begins as a path does"
    if repo.count("/") != 1:
        return f"it has {repo.count('/') or 'no'} '/': ids are owner/name"
    owner, name = repo.split("/")
    for part in (owner, name):
        if not NAME.fullmatch(part):
            return (
                f"{part!r} is not a valid name: letters, digits and single '.', '_', '-', "
                "starting with a letter or digit"
            )
    if len(repo) > LONGEST:
        return f"it has {len(repo)} characters, and ids have at most {LONGEST}"
    if name.endswith(".git"):
        return "it ends in .git: wanted an id, not a URL"
    if at and (not REVISION.fullmatch(revision) or ".." in revision):
        return f"{revision!r} after the '@' is not a branch, tag or commit"
    if not explicit and Path(owner).is_dir():
        return f"a local folder {owner} exists (write {PREFIX}{text} for the hub)"
    return HubId(repo, revision or None)


def pinned_id(text: str) -> HubId | None:
    """The id of a text that the driver has pinned; None for anything else, such as a folder."""
    repo, _, revision = text.partition("@")
    if not COMMIT.fullmatch(revision) or repo.count("/") != 1 or os.path.isdir(text):
        return None
    return HubId(repo, revision)


def cache_folder(env: Mapping[str, str]) -> Path:
    """Cache folder of huggingface_hub, by its own rules."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def names_a_cache(env: Mapping[str, str]) -> bool:
    return any(env.get(key) for key in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))


def snapshot_folder(cache: Path, hub_id: HubId) -> Path | None:
    """Folder of that revision in a cache; it exists as soon as any file of the revision has been fetched."""
    repo = cache / hub_id.cache_name
    commit = hub_id.revision or "main"
    if not hub_id.is_pinned:
        try:
            commit = (repo / "refs" / commit).read_text().strip()
        except OSError:
            return None
    folder = repo / "snapshots" / commit
    return folder if folder.is_dir() else None
