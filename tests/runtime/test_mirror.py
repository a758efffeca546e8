"""The driver's files reach the bucket and come back on another machine; two machines never own one run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runtime import mirror as module
from rayrlhf.runtime.mirror import LEASE_SECONDS, OWNER, Mirror
from rayrlhf.runtime.preflight import InputError
from tests.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)


def start(folder: Path, *, node: str = "one") -> Mirror:
    path = folder / node
    path.mkdir(exist_ok=True)
    return Mirror(path, f"s3://{BUCKET}/{folder.name}/run")


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_has_changed_is_copied_and_what_workers_upload_is_not(tmp_path: Path) -> None:
    mirror = start(tmp_path)
    write(mirror.path, metrics="1", eval__before="2", checkpoints__x="3", data__rows="4", scratch__y="5")
    write(mirror.path, **{"run.lock": "6", "metrics.partial": "7"})
    assert mirror.copy_changes() == ["eval/before", "metrics"]
    assert mirror.copy_changes() == []
    write(mirror.path, metrics="1\n2")
    os.rename(mirror.path / "eval/before", mirror.path / "eval/superseded")
    assert mirror.copy_changes() == ["eval/superseded", "metrics", "eval/before"]
    assert mirror.remote.sizes() == {"eval/superseded": 1, "metrics": 3}


def test_a_second_machine_goes_on_with_the_files_of_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    first = start(tmp_path)
    first.fetch(said.append)
    with first.running(said.append):
        write(first.path, metrics="1", eval__a="2")
    second = start(tmp_path, node="two")
    write(second.path, metrics="of a start before the first", other="")
    second.fetch(said.append)
    assert (second.path / "metrics").read_text() == "1" and (second.path / "eval/a").read_text() == "2"
    assert not (second.path / "other").exists() and len(said) == 1 and said[0].startswith("2 files")
    with second.running(said.append):
        write(second.path, metrics="1\n2")
    third = start(tmp_path)  # on the first machine again
    third.fetch(said.append)
    assert (third.path / "metrics").read_text() == "1\n2"
    write(third.path, metrics="1\n2\n3")  # killed before it was copied: the newest is here
    fourth = start(tmp_path)
    fourth.fetch(said.append)
    assert (fourth.path / "metrics").read_text() == "1\n2\n3"


def owner(mirror: Mirror, **changes: Any) -> None:
    found = json.loads(mirror.remote.read(OWNER) or b"")
    mirror.remote.write(OWNER, json.dumps(found | changes))


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    first = start(tmp_path)
    with first.running(print):
        for other in (start(tmp_path), start(tmp_path, node="two")):
            with pytest.raises(InputError, match=r"in use by process \d+ on .*, last seen 0 s ago"):
                other.fetch(print)
                other.running(print).__enter__()
        owner(first, pid=2**22 + 1)  # its process here is dead: nobody has to wait
        with start(tmp_path, node="three").running(print):
            pass
    with start(tmp_path, node="two").running(print):
        pass


@pytest.mark.parametrize(("silent", "is_over"), [(LEASE_SECONDS - 20, False), (LEASE_SECONDS + 1, True)])
def test_a_silent_owner_on_another_machine_loses_the_run(
    tmp_path: Path, silent: float, is_over: bool
) -> None:
    first = start(tmp_path)
    with first.running(print):
        owner(first, host="elsewhere", seen=time.time() - silent)
        second = start(tmp_path, node="two")
        if is_over:
            with second.running(print):
                pass
        else:
            with pytest.raises(InputError, match="elsewhere"), second.running(print):
                pass


def test_it_is_copied_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_SECONDS", 0.05)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.1)
    mirror = start(tmp_path)
    with mirror.running(print):
        seen = json.loads(mirror.remote.read(OWNER) or b"")["seen"]
        write(mirror.path, metrics="1")
        deadline = time.monotonic() + 20
        while mirror.remote.read("metrics") is None or (
            json.loads(mirror.remote.read(OWNER) or b"")["seen"] == seen
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_bucket_that_goes_away_is_said_once_and_the_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COPY_SECONDS", 0.01)
    said: list[str] = []
    mirror = start(tmp_path)
    with mirror.running(said.append):

        def upload(*_: Any) -> None:
            raise OSError("unreachable")

        monkeypatch.setattr(type(mirror.remote), "upload", upload)
        write(mirror.path, metrics="1")
        time.sleep(0.5)
    assert len(said) == 2 and "tried again: unreachable" in said[0]
    assert said[1].endswith(f"only in {mirror.path}: unreachable")
    assert (mirror.path / "metrics").read_text() == "1"
