"""The real huggingface_hub client against a hub on loopback: pinning, fetching, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from rayrlhf.hub.access import Access, access_from_env
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.ids import cache_folder, parse_id
from rayrlhf.hub.local import local_folder
from rayrlhf.hub.resolve import base_of, folder_of, resolve
from rayrlhf.hub.snapshots import small_files, weight_files
from tests.local_hub import TOKEN, LocalHub

NOBODY = "http://127.0.0.1:9"  # no port that anybody listens on
WEIGHTS = "tiny/policy/model.safetensors"


def pinned(text: str, lines: list[str] | None = None, *, needs_tokenizer: bool = True) -> str:
    """As the driver pins an id of a config."""
    import os

    hub_id = parse_id(text)
    assert not isinstance(hub_id, str), hub_id
    say = (lines if lines is not None else []).append
    cache = cache_folder(os.environ)
    return str(resolve(hub_id, access_from_env(), cache, say=say, needs_tokenizer=needs_tokenizer))


def test_pinning_fetches_what_is_small_and_loading_the_weights_once(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.repos["model", "tiny/policy"].refs["main"]
    ref = pinned("tiny/policy")
    assert ref == f"tiny/policy@{commit}"
    assert hub.downloads()["tiny/policy/config.json"] == 1
    assert hub.downloads()[WEIGHTS] == 0

    tokenizer_only = Path(local_folder(ref, weights=False))
    assert not (tokenizer_only / "model.safetensors").exists()
    folder = Path(local_folder(ref))
    assert folder == tmp_path / "home/hub/models--tiny--policy/snapshots" / commit
    assert (folder / "model.safetensors").is_file()
    asked = len(hub.asked)
    assert local_folder(ref) == str(folder)
    assert len(hub.asked) == asked, "what is there is not asked for again"
    assert set(hub.downloads().values()) == {1}


def test_a_pinned_id_stays_when_the_branch_moves(hub: LocalHub, policy: Path, tmp_path: Path) -> None:
    ref = pinned("tiny/policy")
    repo = hub.repos["model", "tiny/policy"]
    repo.folder = Path(shutil.copytree(policy, tmp_path / "changed"))
    (repo.folder / "README.md").write_text("new")
    newer = repo.commit()
    assert not ref.endswith(newer)
    assert pinned(ref) == ref
    assert pinned("tiny/policy") == f"tiny/policy@{newer}"
    assert pinned("tiny/policy@main") == f"tiny/policy@{newer}"


def test_a_second_start_needs_no_network(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = pinned("tiny/policy")
    folder = local_folder(ref)
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    assert pinned("tiny/policy") == ref
    assert local_folder(ref) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pinned("tiny/policy") == ref
    assert local_folder(ref) == folder


def refused(text: str) -> str:
    with pytest.raises(HubError) as caught:
        pinned(text)
    message = str(caught.value)
    assert "Fix: " in message and "\n" not in message
    return message


def test_a_missing_repository_or_revision(hub: LocalHub) -> None:
    assert "has none of that name that a request without a token may see" in refused("tiny/none")
    assert "no revision v9" in refused("tiny/policy@v9")


def test_a_gated_repository_needs_a_token_with_access(
    hub: LocalHub, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("tiny/gated", policy, gated=True)
    assert "is gated at 127.0.0.1:" in refused("tiny/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Path(local_folder(pinned("tiny/gated")), "model.safetensors").is_file()


def test_a_private_repository_and_a_wrong_token(
    hub: LocalHub, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("tiny/private", policy, private=True)
    assert "none of that name that a request without a token may see" in refused("tiny/private")
    monkeypatch.setenv("HF_TOKEN", "hf_thisisawrongtoken")
    message = refused("tiny/private")
    assert "refuses the token of this machine as invalid" in message
    assert "wrongtoken" not in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pinned("tiny/private").startswith("tiny/private@")


def test_offline_with_an_empty_cache(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("tiny/policy")
    assert "HF_HUB_OFFLINE is set" in message and "hf download tiny/policy" in message
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    message = refused("tiny/policy")
    assert "127.0.0.1:9 cannot be reached" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "removed, reason",
    [
        ("config.json", "has no config.json; it holds: "),
        ("model.safetensors", "has no model.safetensors and no pytorch_model.bin"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_what_a_repository_lacks(
    hub: LocalHub, policy: Path, tmp_path: Path, removed: str, reason: str
) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "poor"))
    (folder / removed).unlink()
    hub.add("tiny/poor", folder)
    assert reason in refused("tiny/poor")


def test_an_adapter_is_no_model(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "tiny/policy", "revision": "v2"})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    hub.add("tiny/adapter", folder)
    assert "is an adapter, not a full model" in refused("tiny/adapter")
    found = folder_of("tiny/adapter", "ADAPTER", say=print, may_be_adapter=True)
    assert Path(found, "adapter_model.safetensors").is_file()
    assert base_of(Path(found)) == "tiny/policy@v2"


def test_a_full_disk_is_reported_before_anything_is_fetched(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = pinned("tiny/policy")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(HubError, match=r"1\.\d MB to fetch, but .* has 1 B free. Fix: free space"):
        local_folder(ref)
    assert hub.downloads()[WEIGHTS] == 0


def test_a_folder_is_never_looked_up_in_the_hub(hub: LocalHub, policy: Path) -> None:
    assert local_folder(str(policy)) == str(policy)
    assert folder_of(str(policy), "MODEL", say=print) == str(policy)
    with pytest.raises(HubError, match=r"MODEL=./tiny/policy: no such folder .* begins as a path does"):
        folder_of("./tiny/policy", "MODEL", say=print)
    assert hub.asked == []


def test_one_format_of_weights_is_fetched() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("abc", [*shards, shards[0]], strict=True))}
    others = ["pytorch_model.bin", "model.onnx", "model.gguf", "flax_model.msgpack", "consolidated.00.pth"]
    nested = ["original/params.json", "onnx/config.json", "additional_chat_templates/x.jinja", "lib/code.py"]

    def read(name: str) -> dict[str, dict[str, str]]:
        assert name == "model.safetensors.index.json"
        return index

    names = [*shards, "model.safetensors.index.json", *others]
    assert weight_files(names, read) == shards
    assert weight_files(["consolidated.safetensors", "model.safetensors", *others], read) == [
        "model.safetensors"
    ]
    assert weight_files(others, read) == ["pytorch_model.bin"]
    assert weight_files(["model.gguf"], read) == []
    small = ["config.json", "tokenizer.model", "chat_template.jinja", "modeling.py", "README.md"]
    assert small_files([*names, *nested, *small]) == sorted(
        [*small[:-1], "model.safetensors.index.json", *nested[2:]]
    )


def test_a_node_that_cannot_reach_the_hub_takes_the_drivers_shared_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's own HF_HOME comes first; without a hub, what it sees of the driver's folder is better than
    nothing. Where its environment names none, the driver's is its cache.
    """
    from rayrlhf.hub import local

    ref = pinned("tiny/policy")
    folder = local_folder(ref)
    settings = local.HubSettings(access_from_env(), str(tmp_path / "home" / "hub"), cache_is_named=True)
    monkeypatch.setattr(local, "_settings_of_run", lambda _: settings)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "node"))
    own = local_folder(ref)
    assert own.startswith(str(tmp_path / "node")) and hub.downloads()[WEIGHTS] == 2
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other-node"))
    unreachable = local.HubSettings(Access(TOKEN, NOBODY), settings.cache, cache_is_named=True)
    monkeypatch.setattr(local, "_settings_of_run", lambda _: unreachable)
    assert local_folder(ref) == folder
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert local_folder(ref) == folder


def test_a_download_that_stands_still_is_given_up(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.hub import snapshots

    ref = pinned("tiny/policy")
    hub.bytes_per_second = 1.0  # a piece of 64 KiB takes hours
    monkeypatch.setattr(snapshots, "STALLED_SECONDS", 2.0)
    with pytest.raises(HubError, match=r"no data for 2 s, after .* of 1\.\d MB in 1 file\. Fix: "):
        local_folder(ref)
    hub.bytes_per_second = None


def test_a_long_download_says_how_far_it_is(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.hub import snapshots

    ref, lines = pinned("tiny/policy"), list[str]()
    hub.bytes_per_second = 600_000.0  # two seconds for the weights
    monkeypatch.setattr(snapshots, "PROGRESS_SECONDS", 0.4)
    local_folder(ref, say=lines.append)
    assert lines[0].startswith("fetching tiny/policy: 1.3 MB in 1 file")
    assert lines[-1].startswith("fetched tiny/policy: 1.3 MB in ")
    assert len(lines) > 3
