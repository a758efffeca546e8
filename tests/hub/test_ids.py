"""Ids are distinguished from folders without a request to the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.hub.ids import HubId, cache_folder, parse_id, pinned_id, snapshot_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name-1.5_b", HubId("owner/name-1.5_b")),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("owner/name@refs/pr/4", HubId("owner/name", "refs/pr/4")),
        (f"owner/name@{COMMIT}", HubId("owner/name", COMMIT)),
        ("hub@owner/name", HubId("owner/name")),
    ],
)
def test_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: HubId) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_id(text) == wanted


@pytest.mark.parametrize(
    "text, reason",
    [
        ("./owner/name", "begins as a path does"),
        ("/owner/name", "begins as a path does"),
        ("~/name", "begins as a path does"),
        ("name", "it has no '/'"),
        ("a/b/c", "it has 2 '/'"),
        ("owner/na me", "'na me' is not a valid name"),
        ("owner/a--b", "'a--b' is not a valid name"),
        ("owner/" + "x" * 91, "97 characters"),
        ("owner/name.git", "ends in .git"),
        ("owner/name@", None),
        ("owner/name@../x", "'../x' after the '@'"),
    ],
)
def test_what_is_no_id_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = parse_id(text)
    if reason is None:
        assert isinstance(parsed, str)
    else:
        assert isinstance(parsed, str) and reason in parsed


def test_below_a_folder_that_is_here_only_the_prefix_means_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/tiny` with a folder models/ is a typo of a path, and never asked for at the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert "a local folder models exists" in str(parse_id("models/tiny"))
    assert parse_id("hub@models/tiny") == HubId("models/tiny")


def test_only_a_commit_pins() -> None:
    assert pinned_id(f"owner/name@{COMMIT}") == HubId("owner/name", COMMIT)
    for text in ("owner/name", "owner/name@main", "/some/folder", f"name@{COMMIT}"):
        assert pinned_id(text) is None


def test_caches_are_where_huggingface_hub_has_them() -> None:
    home = str(Path.home())
    assert str(cache_folder({})) == f"{home}/.cache/huggingface/hub"
    assert str(cache_folder({"XDG_CACHE_HOME": "/x"})) == "/x/huggingface/hub"
    assert str(cache_folder({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"})) == "/h/hub"
    assert str(cache_folder({"HF_HUB_CACHE": "~/c", "HF_HOME": "/h"})) == f"{home}/c"


def test_a_branch_is_found_through_its_ref(tmp_path: Path) -> None:
    repo = tmp_path / "models--owner--name"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    assert snapshot_folder(tmp_path, HubId("owner/name")) is None
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    assert snapshot_folder(tmp_path, HubId("owner/name")) == repo / "snapshots" / COMMIT
    assert snapshot_folder(tmp_path, HubId("owner/name", COMMIT)) == repo / "snapshots" / COMMIT
    assert snapshot_folder(tmp_path, HubId("owner/name", "v2")) is None
