"""A Ray cluster of one machine that belongs to one process and goes away with it.

    with LocalHead(num_cpus=4) as head:
        subprocess.run(["ray", "job", "submit", ...], env=head.client_env())

The head uses free ports, a session folder and an access token of its own: it never meets another Ray cluster
on the same machine, and nobody else can submit work to it. All of its services listen on loopback alone.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO

# A path to a UNIX socket has at most 107 bytes (sun_path in unix(7)); Ray appends about 70 to its temporary
# folder: /session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.
MAX_TEMP_DIR_BYTES = 107 - 72

START_TIMEOUT_SECONDS = 120.0  # it takes 3 s on an idle machine, and 20 s on a busy one with two cores
STOP_TIMEOUT_SECONDS = 20.0  # more than the supervisor's two deadlines together
POLL_SECONDS = 0.1
LAST_WORDS_CHARACTERS = 2000
MAX_OUTPUT_BYTES = 1_000_000  # `ray start` says a few kilobytes
STARTED = "Ray runtime started"  # what `ray start` prints when all of its processes are up
SUPERVISOR = Path(__file__).with_name("supervisor.py")

# Ray replaces 127.0.0.1 by the address of an interface unless this is 0 (services.resolve_ip_for_localhost in
# Ray 2.60); with that address of a node every service of Ray listens there alone.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Settings of another cluster or of an enclosing Ray job, which must not reach this one.
FOREIGN_SETTINGS = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_TMPDIR",
)


class LocalHead:
    """Starts `ray start --head --block` on entering and ends exactly its process tree on leaving.

    Without a `temp_dir` a short one is made under /tmp; either way it is empty at first, and removed with the
    head. `num_cpus` and `num_gpus` are what Ray may hand out, by default what the machine has; `num_cpus`
    counts slots, it may exceed the number of cores. Start it from a thread that lives as long as the head
    (the main thread, usually): Linux ties the head's life to the thread that started it.

    Entering raises `RuntimeError` with the end of Ray's own output when the head does not come up within
    `start_timeout_seconds`, and `FileExistsError` when `temp_dir` holds something already. Making one raises
    `ValueError` when the path of `temp_dir` is too long for Ray's sockets.
    """

    def __init__(
        self,
        temp_dir: Path | None = None,
        num_cpus: int | None = None,
        *,
        num_gpus: int | None = None,
        object_store_bytes: int | None = None,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
    ) -> None:
        # Absolute: the supervisor and Ray run in that folder, not in ours.
        self.temp_dir = Path(temp_dir or f"/tmp/ray-{secrets.token_hex(4)}").absolute()
        length = len(os.fsencode(self.temp_dir))
        if length > MAX_TEMP_DIR_BYTES:
            raise ValueError(
                f"temp_dir={str(self.temp_dir)!r} has {length} bytes but Ray's sockets in it allow "
                f"{MAX_TEMP_DIR_BYTES}: choose a shorter path, such as one right under /tmp"
            )
        self._resources = {
            "num-cpus": num_cpus,
            "num-gpus": num_gpus,
            "object-store-memory": object_store_bytes,
        }
        self._start_timeout_seconds = start_timeout_seconds
        self._token = secrets.token_hex(32)  # 256 bits, as Ray makes its own
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._gcs_port = self._jobs_port = 0

    @property
    def gcs_address(self) -> str:
        """For `ray.init(address=…)`."""
        return f"127.0.0.1:{self._gcs_port}"

    @property
    def jobs_address(self) -> str:
        """URL of the job server (which is the dashboard, too)."""
        return f"http://127.0.0.1:{self._jobs_port}"

    @property
    def logs_path(self) -> Path:
        """Ray's own logs, one per process. They vanish with the head: see `save_logs`."""
        return self.temp_dir / "session_latest" / "logs"

    def client_env(self) -> dict[str, str]:
        """This process's environment made fit to talk to this head, for `ray job submit` and the like."""
        return {
            **_own_environment(),
            **LOOPBACK,
            "RAY_API_SERVER_ADDRESS": self.jobs_address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }

    def save_logs(self, destination: Path) -> None:
        """Copy Ray's logs, sockets and the like left out, to a folder that outlives the head."""
        shutil.copytree(self.logs_path.resolve(), destination, dirs_exist_ok=True, symlinks=True)

    def __enter__(self) -> LocalHead:
        self.temp_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.temp_dir.iterdir()):
            raise FileExistsError(
                f"temp_dir={str(self.temp_dir)!r} is not empty, and the head would remove it at its end"
            )
        self._gcs_port, self._jobs_port, agent_port, client_port = free_ports(4)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--disable-usage-stats", "--include-dashboard=true"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--port={self._gcs_port}", f"--dashboard-port={self._jobs_port}"]
        command += [f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"]
        # 0: the system picks. Ray's default range would be shared with every other cluster on this machine.
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self.temp_dir}"]
        command += [f"--{name}={value}" for name, value in self._resources.items() if value is not None]
        environment = (
            _own_environment()
            | LOOPBACK
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self._token,
                "PYTHONUNBUFFERED": "1",  # a job's lines arrive as it prints them
                # A job has more processes than a small machine has cores; Ray would warn of it each time.
                "RAY_worker_maximum_startup_concurrency": "16",
            }
        )
        self._output = tempfile.TemporaryFile()  # not in temp_dir, which is gone once Ray has failed
        self._supervisor = subprocess.Popen(
            [sys.executable, str(SUPERVISOR), str(os.getpid()), str(self.temp_dir), *command],
            env=environment,
            cwd=self.temp_dir,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which leaves the `with` block
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        assert self._supervisor is not None
        deadline = time.monotonic() + self._start_timeout_seconds
        # The job server answers before the node is complete, so wait for Ray's own word first.
        while not (STARTED in self._read_output() and self._job_server_answers()):
            if self._supervisor.poll() is not None:
                raise RuntimeError(f"the local Ray head ended while starting. {self._last_words()}")
            if time.monotonic() > deadline:
                limit = f"{self._start_timeout_seconds:g} s"
                raise RuntimeError(f"the local Ray head did not answer within {limit}. {self._last_words()}")
            time.sleep(POLL_SECONDS)

    def _read_output(self) -> str:
        assert self._output is not None
        # Not seek and read: the position is shared with the processes that write.
        return os.pread(self._output.fileno(), MAX_OUTPUT_BYTES, 0).decode(errors="replace").strip()

    def _last_words(self) -> str:
        said = self._read_output()
        return f"The end of its output:\n{said[-LAST_WORDS_CHARACTERS:]}" if said else "It said nothing."

    def _job_server_answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.jobs_address}/api/jobs/", headers={"Authorization": f"Bearer {self._token}"}
        )
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with no_proxy.open(request, timeout=2) as response:
                return response.status == 200
        except (OSError, http.client.HTTPException):  # not listening yet, or not ready
            return False

    def _stop(self) -> None:
        if self._supervisor is None:
            return
        self._supervisor.terminate()
        try:
            self._supervisor.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        shutil.rmtree(self.temp_dir, ignore_errors=True)  # the supervisor did, unless it had to be killed
        self._supervisor = None
        if self._output is not None:
            self._output.close()


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of the loopback interface that nothing listens on right now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for holder in held:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in held]
    finally:
        for holder in held:
            holder.close()


def _own_environment() -> dict[str, str]:
    """This environment with our `python` and `ray` first on the PATH and no other cluster's settings."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", os.defpath)])
    return environment
