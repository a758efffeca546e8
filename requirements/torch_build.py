"""Which build of torch: the lock's version comes for CPUs and for CUDA, and not every index has the first.

In this order: the CPU build of the indexes and folders that pip or uv is configured with; the one that uv
knows where to find (`--torch-backend=cpu`); the default index's CUDA build with its libraries, which works on
a machine without a GPU too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from requirements.indexes import Settings, pip_environment, redact, uv_arguments, uv_environment

PROBE_SECONDS = 60
PIP_PROBE_SECONDS = 300  # pip may have to download a wheel to read its metadata


class Failure(Exception):
    """What failed and what to do, a line each."""


class Build(NamedTuple):
    """A build of torch that can be had here."""

    requirement: str  # torch==2.13.0+cpu
    why: str  # for people
    arguments: tuple[str, ...] = ()  # of uv
    libraries: bool = False  # CUDA's come with it


class Answer(NamedTuple):
    """What a resolver said: `found`, or why not; `reached` is False where an index did not answer."""

    found: bool
    reached: bool
    words: str


def ask_uv(uv: str, python: Path, env: Mapping[str, str], requirement: str, *arguments: str) -> Answer:
    """Whether uv would find `requirement`; nothing is installed."""
    command = [uv, "pip", "compile", "-", "--quiet", "--no-deps", "--no-header", "--emit-index-annotation"]
    command += [f"--python={python}", *arguments]
    env = {**env, "UV_HTTP_TIMEOUT": "8", "UV_HTTP_RETRIES": "0"}
    try:
        done = subprocess.run(
            command, env=env, input=requirement, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Answer(found=False, reached=False, words=f"no answer within {PROBE_SECONDS} s")
    if done.returncode == 0:
        return Answer(found=True, reached=True, words=_origin(done.stdout))
    return Answer(found=False, reached=done.returncode == 1, words=_cause(redact(done.stderr)))


def ask_pip(pip: Sequence[str], env: Mapping[str, str], requirement: str) -> Answer:
    """Whether pip would find `requirement`; nothing is installed."""
    command = [
        *pip,
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--timeout=10", "--retries=0", requirement]
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=PIP_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Answer(found=False, reached=False, words=f"no answer within {PIP_PROBE_SECONDS} s")
    if done.returncode == 0:
        return Answer(found=True, reached=True, words="the configured indexes")
    silent = any(
        words in done.stderr for words in ("connection broken", "Could not fetch URL", "Max retries")
    )
    return Answer(found=False, reached=not silent, words=_cause(redact(done.stderr)))


def choose_with_uv(
    uv: str, python: Path, version: str, settings: Settings, environment: Mapping[str, str]
) -> tuple[Build, Settings]:
    """The build, and the settings without the places that do not answer. Raises `Failure`."""

    def ask(requirement: str, *arguments: str) -> Answer:
        env = uv_environment(settings, environment)
        return ask_uv(uv, python, env, requirement, *uv_arguments(settings), *arguments)

    answer = ask(f"torch=={version}+cpu")
    if not answer.reached:
        settings = _answering(uv, python, settings, environment)
        answer = ask(f"torch=={version}+cpu")
    if answer.found:
        return Build(f"torch=={version}+cpu", f"its CPU build, from {answer.words}"), settings
    if not answer.reached:
        raise no_answer(answer.words)
    why = "no configured index or folder has its CPU build"
    if not settings.no_index:
        backend = ask(f"torch=={version}", "--torch-backend=cpu")
        if backend.found:
            return Build(
                f"torch=={version}", f"its CPU build, from {backend.words}: {why}", ("--torch-backend=cpu",)
            ), settings
        why += f", and uv's own index of CPU builds does not answer ({backend.words})"
    return _default(ask(f"torch=={version}"), version, why), settings


def choose_with_pip(pip: Sequence[str], version: str, environment: Mapping[str, str]) -> Build:
    """As `choose_with_uv`, without uv's own index, which pip does not know. Raises `Failure`."""
    env = pip_environment(environment)
    answer = ask_pip(pip, env, f"torch=={version}+cpu")
    if answer.found:
        return Build(f"torch=={version}+cpu", f"its CPU build, from {answer.words}")
    why = "no configured index or folder has its CPU build"
    return _default(ask_pip(pip, env, f"torch=={version}"), version, why)


def no_answer(words: str) -> Failure:
    """What to do where the index is not reached."""
    return Failure(
        f"the package index does not answer: {words}",
        "Fix: look at the network; behind a proxy set HTTPS_PROXY; with an index of your own set "
        "PIP_INDEX_URL, or index-url in pip.conf; with a certificate of your own set PIP_CERT. "
        "Then run make again.",
    )


def _default(answer: Answer, version: str, why: str) -> Build:
    if answer.found:
        return Build(
            f"torch=={version}", f"its CUDA build with its libraries, which runs on CPUs too: {why}", (), True
        )
    if not answer.reached:
        raise no_answer(answer.words)
    raise Failure(
        f"no build of torch {version} was found for this machine: {answer.words}",
        "Fix: let PIP_INDEX_URL name an index that has it, or in PIP_FIND_LINKS a folder that has its wheel.",
    )


def _answering(uv: str, python: Path, settings: Settings, environment: Mapping[str, str]) -> Settings:
    """Without the extra places that do not answer: uv would give up at the first of them."""

    def answers(alone: Settings) -> bool:
        return ask_uv(uv, python, uv_environment(alone, environment), "torch", *uv_arguments(alone)).reached

    nothing = settings._replace(extra_indexes=(), find_links=(), no_index=False)
    return settings._replace(
        extra_indexes=tuple(
            place for place in settings.extra_indexes if answers(nothing._replace(default_index=place))
        ),
        find_links=tuple(
            place
            for place in settings.find_links
            if answers(nothing._replace(find_links=(place,), no_index=True))
        ),
    )


def _origin(compiled: str) -> str:
    """Of "torch==1 # from PLACE"."""
    places = [line.partition("# from ")[2] for line in compiled.splitlines() if "# from " in line]
    return redact(places[0].strip()) if places else "the configured indexes"


def _cause(words: str) -> str:
    """uv's or pip's last line that says something."""
    said = [
        line.strip()
        for line in words.splitlines()
        if line.strip() and not line.startswith(("hint", "[notice]"))
    ]
    return said[-1].removeprefix("cause: ").removeprefix("ERROR: ") if said else "it gave no reason"
