"""A real Ray head: it takes jobs, keeps strangers out, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local.head import LocalHead

OBJECT_STORE_BYTES = 100_000_000


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(num_cpus=3, num_gpus=0, object_store_bytes=OBJECT_STORE_BYTES) as running:
        yield running
        (supervisor,) = (p for p in psutil.Process().children() if str(running.temp_dir) in p.cmdline())
        tree = [supervisor, *supervisor.children(recursive=True)]
        names = " ".join(process.name() for process in tree)
        assert "raylet" in names and "gcs_server" in names
    # Checked at the module's end, since a head takes seconds to start.
    left = [process for process in tree if process.is_running()]
    assert not left, f"still running: {left}"
    assert not running.temp_dir.exists()


def submit(head: LocalHead, folder: Path, *entrypoint: str) -> str:
    """Submit with the command line from `folder`; its output. The token travels in the environment."""
    done = subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint],
        cwd=folder,
        env=head.client_env(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
def test_a_job_runs_with_our_python_and_sees_what_git_does_not_ignore(
    head: LocalHead, tmp_path: Path
) -> None:
    (tmp_path / ".gitignore").write_text("/models/\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "large.bin").write_bytes(b"x")
    (tmp_path / "job.py").write_text(
        "import os, sys, ray\n"
        "ray.init(log_to_driver=False)\n"
        "print('python', sys.executable)\n"
        "print('cpus', int(ray.cluster_resources()['CPU']))\n"
        "print('files', sorted(os.listdir('.')))\n"
    )
    lines = submit(head, tmp_path, "python", "job.py").splitlines()
    assert f"python {sys.executable}" in lines
    assert "cpus 3" in lines
    assert "files ['.gitignore', 'job.py']" in lines


@pytest.mark.ray
def test_all_of_its_services_listen_on_loopback_alone(head: LocalHead) -> None:
    """Ten ports were open on every interface before, the GCS's and the workers' among them."""
    (supervisor,) = (p for p in psutil.Process().children() if str(head.temp_dir) in p.cmdline())
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


@pytest.mark.ray
def test_without_the_token_nobody_gets_in(head: LocalHead) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{head.jobs_address}/api/jobs/", timeout=10
        )
    assert refused.value.code in (401, 403)


@pytest.mark.ray
def test_a_head_that_cannot_start_says_why() -> None:
    # Ray refuses an object store of less than 75 MiB.
    broken = LocalHead(num_cpus=1, num_gpus=0, object_store_bytes=1_000)
    with pytest.raises(RuntimeError, match=r"(?s)ended while starting.*object.store"), broken:
        pass
    assert not broken.temp_dir.exists()


def test_a_long_temp_dir_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"has 60 bytes .* allow 35"):
        LocalHead(Path("/" + "x" * 59))


def test_a_temp_dir_with_content_is_refused_and_kept() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="head-") as mine:  # pytest's tmp_path is too long
        thesis = Path(mine) / "thesis.tex"
        thesis.write_text("")
        with pytest.raises(FileExistsError, match="not empty"):
            LocalHead(Path(mine)).__enter__()
        assert thesis.exists()


def test_a_relative_temp_dir_is_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    assert LocalHead(Path("mine")).temp_dir == Path("/tmp/mine")
