"""Data sets of a hub on loopback, with the real `datasets` library in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.local_hub import TOKEN, LocalHub, local_hub

PROGRAM = """
import json, sys
from pathlib import Path
from rayrlhf.config.example_data import SftDataConfig
from rayrlhf.data.sources.hub_files import load_hub_dataset, shared_copy
from rayrlhf.data.sources.hub_pins import pin_data

config, began_with, folder = json.loads(sys.argv[1])
lines, problems = [], []
data = pin_data(SftDataConfig.model_validate(config), began_with, lines.append, problems)
rows = {}
for source in data.train:
    path = source.path.removeprefix("hub@")
    if not problems and source.path.startswith("hub@"):
        copy = shared_copy(path if ":" in path else f"{path}:train", Path(folder))
        import datasets
        rows[path] = [row["prompt"] for row in datasets.load_from_disk(copy)]
print(json.dumps([[source.path for source in data.train], problems, lines, rows]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    folder = tmp_path / "chats"
    (folder / "hard").mkdir(parents=True)
    for name, words in (("train.jsonl", ["a", "b", "c"]), ("hard/train.jsonl", ["x", "y"])):
        rows = [{"prompt": word, "response": word * 2} for word in words]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  default: true\n  data_files: train.jsonl\n"
        "- config_name: hard\n  data_files: hard/train.jsonl\n---\n"
    )
    with local_hub() as hub:
        hub.add("owner/chats", folder, kind="dataset")
        hub.add("owner/gated", folder, kind="dataset", gated=True)
        yield hub


def pinned(hub: LocalHub, tmp_path: Path, config: Any, began_with: Any = None, **environment: str) -> Any:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, **environment}
    words = json.dumps([config, began_with, str(tmp_path / "copies")])
    command = [sys.executable, "-c", PROGRAM, words]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_data_set_is_pinned_fetched_and_copied_for_all_nodes(hub: LocalHub, tmp_path: Path) -> None:
    """Also its second configuration, of which only the files are fetched; offline afterwards; and a run that
    began with a commit keeps it when the branch has moved.
    """
    repo = hub.repos["dataset", "owner/chats"]
    commit = repo.refs["main"]
    config = {"train": ["owner/chats", "hub@owner/chats/hard:train"]}
    paths, problems, lines, rows = pinned(hub, tmp_path, {"train": "owner/chats/hard"})
    assert problems == [] and paths == [f"hub@owner/chats/hard@{commit}"]
    assert rows == {f"owner/chats/hard@{commit}": ["x", "y"]}
    assert any(line.startswith("fetched owner/chats: ") for line in lines)
    assert hub.downloads()["datasets/owner/chats/train.jsonl"] == 0

    paths, problems, _, _ = pinned(hub, tmp_path, config)
    assert problems == []
    assert paths == [f"hub@owner/chats@{commit}", f"hub@owner/chats/hard@{commit}:train"]

    (repo.folder / "train.jsonl").write_text('{"prompt": "new", "response": "new"}\n')
    newer = repo.commit()
    began_with = {"train": [{"path": paths[0]}]}
    assert pinned(hub, tmp_path, {"train": "owner/chats"}, began_with)[0] == [f"hub@owner/chats@{commit}"]
    paths, _, _, rows = pinned(hub, tmp_path, {"train": "owner/chats"})
    assert paths == [f"hub@owner/chats@{newer}"] and rows == {f"owner/chats@{newer}": ["new"]}


def test_a_data_set_that_cannot_be_had_says_why(hub: LocalHub, tmp_path: Path) -> None:
    config = {"train": ["owner/none", "owner/chats@v9", "owner/gated"]}
    _, problems, _, _ = pinned(hub, tmp_path, config)
    assert len(problems) == 3
    assert problems[0].startswith("data.train.0: the data set owner/none: 127.0.0.1")
    assert "has owner/chats, but no revision v9" in problems[1]
    assert problems[2].startswith("data.train.2: the data set owner/gated")
    assert "is gated at 127.0.0.1" in problems[2]
    _, problems, _, _ = pinned(hub, tmp_path, {"train": "owner/gated"}, HF_TOKEN=TOKEN)
    assert problems == []
