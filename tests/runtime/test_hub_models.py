"""What the driver makes of the ids in a config, before Ray starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from rayrlhf.config.parse import dump_resolved
from rayrlhf.runtime import hub_models
from rayrlhf.runtime.hub_models import _Fetcher, fetch_here, pin
from rayrlhf.runtime.preflight import InputError
from rayrlhf.runtime.run import start_folder
from tests.hub.conftest import hub, policy  # noqa: F401
from tests.integration.policy_runs import tiny_run
from tests.local_hub import TOKEN, LocalHub
from tests.tiny_model import make_tiny_model


@pytest.fixture
def models(hub: LocalHub, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    """Pinned ids by their names; the scorer is gated."""
    scorer = make_tiny_model(tmp_path / "scorer", sequence_classification=True)
    commit = hub.repos["model", "tiny/policy"].refs["main"]
    return {
        "tiny/policy": f"tiny/policy@{commit}",
        "tiny/scorer": f"tiny/scorer@{hub.add('tiny/scorer', scorer, gated=True)}",
    }


def with_scorer(tmp_path: Path, path: str = "tiny/policy", scorer: str = "tiny/scorer"):
    sources = [{"type": "model", "path": scorer}]
    return tiny_run(tmp_path, path, reward={"sources": sources}, ref={"path": "tiny/policy@main"})


def test_every_id_of_a_config_is_pinned_and_the_resolved_config_says_so(
    hub: LocalHub,  # noqa: F811
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Actor, reference and reward model; the token, which opens one of them, stands in no file."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lines: list[str] = []
    config = pin(with_scorer(tmp_path), lines.append)
    assert config.model.path == models["tiny/policy"]
    assert config.ref is not None and config.ref.path == models["tiny/policy"]
    assert [source.path for source in config.reward.sources] == [models["tiny/scorer"]]  # type: ignore[union-attr]
    assert hub.downloads()["tiny/policy/model.safetensors"] == 0, "not before the checks are through"
    fetch_here(config, lines.append)
    assert hub.downloads()["tiny/policy/model.safetensors"] == 1
    assert any(line.startswith("fetched tiny/scorer: 1.3 MB") for line in lines)

    text = (start_folder(config) / "config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["path"] == models["tiny/policy"]
    assert text == dump_resolved(config)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    hub: LocalHub,  # noqa: F811
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = pin(tiny_run(tmp_path, "tiny/policy"), print)
    start_folder(began)
    repo = hub.repos["model", "tiny/policy"]
    repo.folder = Path(shutil.copytree(repo.folder, tmp_path / "changed"))
    (repo.folder / "README.md").write_text("new")
    newer = f"tiny/policy@{repo.commit()}"
    asked = len(hub.asked)
    assert pin(tiny_run(tmp_path, "tiny/policy"), print) == began
    assert len(hub.asked) == asked, "a resumed run makes no request to the hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pin(tiny_run(tmp_path, "tiny/policy"), print) == began
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    other = tiny_run(tmp_path, "tiny/policy", run={"name": "other", "dir": str(tmp_path / "runs")})
    assert pin(other, print).model.path == newer

    lines: list[str] = []
    assert pin(tiny_run(tmp_path, "tiny/policy@main"), lines.append).model.path == newer
    assert lines[-1] == f"warning: model.path is {newer}, but the run started with {began.model.path}"


def test_all_unavailable_models_are_reported_at_once_by_key(
    hub: LocalHub,  # noqa: F811
    models: dict[str, str],
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError) as caught:
        pin(with_scorer(tmp_path, "./no/such/model"), print)
    first, second = str(caught.value).split("\n")
    assert first.startswith("model.path=./no/such/model: no such folder (looked from ")
    assert "not a hub id, because it begins as a path does" in first
    assert second.startswith("reward.sources.0.path=tiny/scorer: the model tiny/scorer")
    assert "gated" in second and second.count("Fix: ") == 1


def test_folders_alone_ask_nobody(hub: LocalHub, policy: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tiny_run(tmp_path, str(policy))
    assert pin(config, print) == config
    fetch_here(config, print)
    assert hub.asked == []


def test_a_node_that_fetches_loses_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it says after it was asked for take_lines."""
    fetcher = _Fetcher()
    lines: list[str] = []

    def fetch_asking(path: str, say: Callable[[str], None]) -> str:
        say("one")
        lines.extend(fetcher.take_lines())
        say("two")
        return path

    monkeypatch.setattr(hub_models, "local_folder", fetch_asking)
    assert fetcher.fetch(["a"]) == ""
    assert [*lines, *fetcher.take_lines()] == ["one", "two"]
