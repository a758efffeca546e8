"""gpu-check's runner, with steps that end in every way, and its own steps on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.host import ROOT, Host, find_host, source_digest
from benchmarks.gpu_check.peer import Peer, PeerFailed
from benchmarks.gpu_check.registry import STEPS
from benchmarks.gpu_check.results import Result, append, page, read, result_of, succeeded
from benchmarks.gpu_check.runner import Options, Step, run_step
from tests.benchmarks.gpu_check_steps import Doubler

HOST = Host("CPU: test", {"torch": "2.13.0"}, "abc", "digest")
SCHEMA = {
    "name": str,
    "ok": bool | None,
    "reason": str,
    "seconds": float,
    "measured": dict,
    "error": list,
    "device": str,
    "commit": str,
    "source": str,
    "versions": dict,
    "time": str,
}
# The first modules of these are not found, as if they were not installed.
HIDE = """
import importlib.machinery, os, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split(","):
            return None
        return super().find_spec(name, path, target)
sys.meta_path = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""


def step(function: str, seconds: float = 60.0, needs: tuple[str, ...] = ()) -> Step:
    return Step(function, f"tests.benchmarks.gpu_check_steps:{function}", seconds, needs)


def ran(tmp_path: Path, function: str, seconds: float = 60.0) -> Result:
    return run_step(step(function, seconds), HOST, Options("cpu", tmp_path))


def test_a_step_that_passes(tmp_path: Path) -> None:
    result = ran(tmp_path, "passes")
    assert (result.ok, result.reason, result.error) == (True, "", [])
    rate, kernel = {"value": 12.35, "unit": "GB/s"}, {"value": "varlen", "unit": ""}
    assert result.measured == {"rate": rate, "kernel": kernel}


def test_a_step_that_fails_says_why_and_keeps_what_it_measured(tmp_path: Path) -> None:
    result = ran(tmp_path, "fails")
    assert (result.ok, result.reason) == (False, "AssertionError: one is not more than two")
    assert result.measured == {"rate": {"value": 1, "unit": "GB/s"}}
    assert any("in fails" in line for line in result.error)


def test_a_step_that_cannot_run_here_is_skipped(tmp_path: Path) -> None:
    result = ran(tmp_path, "skips")
    assert (result.ok, result.reason) == (None, "needs what is not here")


def test_a_step_without_its_packages_is_skipped(tmp_path: Path) -> None:
    result = run_step(step("passes", needs=("torch", "no_such_package")), HOST, Options("cpu", tmp_path))
    assert (result.ok, result.reason) == (None, "no_such_package is not installed")


def test_a_step_that_hangs_ends_at_its_deadline_with_its_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    result = ran(tmp_path, "hangs", 10.0)
    assert 10 <= time.monotonic() - started < 40
    assert (result.ok, result.reason) == (False, "not done within 10 s")
    assert any("in hangs" in line for line in result.error), "it does not say where"
    child = Path(f"/proc/{result.measured['child']['value']}/status")
    stop = time.monotonic() + 10
    while child.exists() and "(zombie)" not in child.read_text():
        assert time.monotonic() < stop, "it left a process behind"
        time.sleep(0.1)


def test_a_step_that_dies_by_a_signal(tmp_path: Path) -> None:
    result = ran(tmp_path, "dies")
    assert (result.ok, result.reason) == (False, "died by SIGSEGV")
    assert result.measured == {"rate": {"value": 2, "unit": "GB/s"}}


def test_a_step_whose_process_ends_before_it_does(tmp_path: Path) -> None:
    result = ran(tmp_path, "ends_early")
    assert (result.ok, result.reason) == (False, "it ended before its end")


def test_a_peer_has_variables_of_its_own(tmp_path: Path) -> None:
    result = ran(tmp_path, "asks_a_peer")
    assert {name: each["value"] for name, each in result.measured.items()} == {
        "product": 42,
        "in the peer": "set",
        "here": "None",
    }, result


def test_failures_of_a_peer() -> None:
    with Peer(Doubler, 2) as peer, pytest.raises(PeerFailed, match="ValueError: no such number"):
        peer.ask("fail")
    with Peer(Doubler, 2) as peer, pytest.raises(PeerFailed, match="died, exit status -9"):
        peer.ask("die")
    with pytest.raises(PeerFailed, match="TypeError"), Peer(Doubler):
        pass
    assert not [each for each in psutil.Process().children() if each.status() == psutil.STATUS_ZOMBIE]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_host", lambda device: HOST)


def main(out: Path, *arguments: str, steps: list[Step]) -> int:
    return gpu_check.main(["--device", "cpu", "--out", str(out), *arguments], steps)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("here")
def test_a_second_start_runs_what_has_not_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, waited_for = tmp_path / "out.jsonl", tmp_path / "there"
    monkeypatch.setenv("GPU_CHECK_TEST_FILE", str(waited_for))
    steps = [
        step("passes"),
        step("passes_once_a_file_is_there"),
        step("skips"),
        step("passes", needs=("nope",)),
    ]
    steps[3] = replace(steps[3], name="needs a package")
    assert main(out, steps=steps) == 1
    assert [line["ok"] for line in lines(out)] == [True, False, None, None]
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == out.read_text().splitlines()[0], "a JSON line for every step"
    assert "| passes_once_a_file_is_there | FAILED |" in printed and "nope is not installed" in printed
    for line in lines(out):
        assert line.keys() == SCHEMA.keys()
        assert all(isinstance(line[key], kind) for key, kind in SCHEMA.items()), line
        assert all(each.keys() == {"value", "unit"} for each in line["measured"].values())

    waited_for.touch()
    assert main(out, steps=steps) == 0
    assert [line["name"] for line in lines(out)[4:]] == [
        "passes_once_a_file_is_there",
        "skips",
        "needs a package",
    ]
    assert "| passes | ok |" in capsys.readouterr().out, "the table has what was done earlier"
    assert main(out, "--again", "--only", "passes", steps=steps) == 0
    assert len(lines(out)) == 8
    monkeypatch.setattr(gpu_check, "find_host", lambda device: replace(HOST, source="of other code"))
    assert main(out, "--only", "passes", steps=steps) == 0
    assert lines(out)[-1]["source"] == "of other code" and len(lines(out)) == 9


@pytest.mark.usefixtures("here")
def test_no_step_starts_without_time_left(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(out, "--budget", "5", steps=[step("passes")]) == 0
    assert lines(out)[0]["reason"] == "the budget of 5 s is used up"


def test_results_of_another_device_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    append(out, result_of(HOST, "done", True))
    append(out, result_of(HOST, "failed", False, "why"))
    append(out, result_of(replace(HOST, device="NVIDIA H200"), "elsewhere", True))
    append(out, result_of(replace(HOST, versions={"torch": "2.11.0"}), "with another torch", True))
    with out.open("a") as file:
        file.write('{"name": "cut o')
    assert succeeded(out, HOST).keys() == {"done"}
    assert len(read(out)) == 4


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "planner.json"
    other.write_text('{"rows": []}\n')
    with pytest.raises(ValueError, match=r"planner.json:1 is not a result of gpu-check"):
        read(other)


def test_the_page_names_the_device_and_has_every_number() -> None:
    measured = {"a | b": {"value": 3.5, "unit": "GB/s"}}
    text = page(replace(HOST, device="NVIDIA H200"), [result_of(HOST, "ipc", True, measured=measured)])
    assert text.startswith("# GPU check on NVIDIA H200\n")
    assert "| a \\| b | 3.5 | GB/s |" in text


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main([]) == 0
    assert "No CUDA device here" in capsys.readouterr().out


def test_the_host_is_named_with_its_versions() -> None:
    host = find_host("cpu")
    assert host is not None and host.device.startswith("CPU: ")
    assert host.versions["torch"] and host.source == source_digest() and len(host.source) == 16


def results_with_hidden(tmp_path: Path, hidden: str, names: list[str]) -> dict[str, Result]:
    """Of these steps on the CPU, where the hidden packages are not installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(out)]
    subprocess.run(
        [*command, "--traces", str(tmp_path / "traces"), "--only", *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "HIDDEN": hidden},
        check=False,
    )
    return {result.name: result for result in read(out)}


@pytest.mark.slow
def test_most_steps_need_neither_ray_nor_deepspeed_nor_vllm(tmp_path: Path) -> None:
    hidden = {"ray", "deepspeed", "vllm"}
    missing = {each.name: hidden & set(each.needs) for each in STEPS}
    assert {name for name in missing if missing[name]} == {"zero2", "zero3", "engine", "ppo"}
    results = results_with_hidden(tmp_path, ",".join(hidden), list(missing))
    assert results.keys() == missing.keys()
    for name, result in results.items():
        if missing[name]:
            assert result.ok is None and result.reason.endswith("not installed"), result
            assert all(package in result.reason for package in missing[name]), result
        elif name == "cumem":
            assert result.reason.startswith("needs a GPU"), result
        else:
            assert result.ok, result
    assert (tmp_path / "traces/update_1b.json.gz").stat().st_size > 1000


@pytest.mark.long
def test_steps_that_need_torch_and_transformers_alone(tmp_path: Path) -> None:
    names = [each.name for each in STEPS if not each.needs]
    assert {"attention", "ipc_handles", "cumem", "contention", "host_copies", "fused_head"} <= set(names)
    hidden = "ray,deepspeed,vllm,pydantic,zmq,datasets,bitsandbytes,flash_attn"
    results = results_with_hidden(tmp_path, hidden, names)
    assert {name: result.ok for name, result in results.items() if name != "cumem"} == dict.fromkeys(
        set(names) - {"cumem"}, True
    ), results


@pytest.mark.long
@pytest.mark.ray
def test_the_steps_with_ray_deepspeed_and_vllm(tmp_path: Path) -> None:
    names = ["zero2", "zero3", "engine", "ppo"]
    results = results_with_hidden(tmp_path, "", names)
    assert {name: result.ok for name, result in results.items()} == dict.fromkeys(names, True), results
