"""Which build of torch is taken, and what is said where there is none; with a uv made for it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from requirements.indexes import Settings
from requirements.torch_build import Build, Failure, choose_with_pip, choose_with_uv

PYTHON = Path(sys.executable)
# Exit status by what is asked: 1 for "there is no such version" and 2 for "no answer", as uv has them.
FAKE_UV = """\
#!{python} -I
import json, os, sys
answers = json.loads(os.environ["ANSWERS"])
requirement = sys.stdin.read()
kind = "backend" if "--torch-backend=cpu" in sys.argv else "cpu" if "+cpu" in requirement else "default"
places = os.environ.get("UV_INDEX", "").split() + [os.environ.get("UV_DEFAULT_INDEX", "")]
with open(os.environ["ASKED"], "a") as file:
    print(kind, *filter(None, places), file=file)
status = 2 if any("silent" in place for place in places) else answers.get(kind, 1)
if status:
    print("error: a headline\\n  cause: " + ("dns error" if status == 2 else "no version"), file=sys.stderr)
else:
    print(requirement.strip(), "    # from https://user:s3cret@cpu.example/simple", sep="\\n")
sys.exit(status)
"""


class Fake:
    """A command that answers as it is told to, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.command = folder / "uv"
        self.command.write_text(FAKE_UV.format(python=sys.executable))
        self.command.chmod(0o755)
        self._asked = folder / "asked"

    def choose(self, answers: dict[str, int], settings: Settings | None = None) -> tuple[Build, Settings]:
        env = {**os.environ, "ANSWERS": json.dumps(answers), "ASKED": str(self._asked)}
        env = {name: value for name, value in env.items() if not name.startswith(("UV_", "PIP_"))}
        return choose_with_uv(str(self.command), PYTHON, "2.13.0", settings or Settings(), env)

    @property
    def asked(self) -> list[str]:
        return self._asked.read_text().splitlines()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_cpu_build_of_the_configured_indexes_is_taken_and_nothing_else_asked(fake: Fake) -> None:
    build, _ = fake.choose({"cpu": 0, "backend": 0, "default": 0})
    assert build.requirement == "torch==2.13.0+cpu" and not build.libraries and not build.arguments
    assert build.why == "its CPU build, from https://***@cpu.example/simple"
    assert fake.asked == ["cpu"]


def test_without_one_uvs_own_index_of_cpu_builds_is_asked(fake: Fake) -> None:
    build, _ = fake.choose({"backend": 0, "default": 0})
    assert build.requirement == "torch==2.13.0" and build.arguments == ("--torch-backend=cpu",)
    assert not build.libraries and fake.asked == ["cpu", "backend"]


def test_without_both_the_default_build_comes_with_its_libraries_and_it_says_why(fake: Fake) -> None:
    build, _ = fake.choose({"backend": 2, "default": 0})
    assert build.requirement == "torch==2.13.0" and build.libraries and not build.arguments
    assert "its CUDA build with its libraries, which runs on CPUs too: no configured index" in build.why
    assert "does not answer (dns error)" in build.why
    assert fake.asked == ["cpu", "backend", "default"]


def test_no_build_at_all_says_what_to_do(fake: Fake) -> None:
    with pytest.raises(
        Failure, match=r"no build of torch 2\.13\.0 was found for this machine: no version"
    ) as caught:
        fake.choose({"backend": 2})
    assert "PIP_INDEX_URL" in caught.value.args[1] and "PIP_FIND_LINKS" in caught.value.args[1]


def test_an_index_that_does_not_answer_is_not_taken_for_one_without_torch(fake: Fake) -> None:
    settings = Settings(default_index="https://silent.example/simple")
    with pytest.raises(Failure, match="the package index does not answer: dns error") as caught:
        fake.choose({"cpu": 0}, settings)
    assert "HTTPS_PROXY" in caught.value.args[1]


def test_an_extra_index_that_does_not_answer_is_left_out(fake: Fake) -> None:
    """uv would give up at it; pip goes on without it."""
    good, silent = "https://good.example/simple", "https://silent.example/simple"
    build, settings = fake.choose({"cpu": 0}, Settings(extra_indexes=(silent, good)))
    assert build.requirement == "torch==2.13.0+cpu" and settings.extra_indexes == (good,)
    assert fake.asked == [f"cpu {silent} {good}", f"default {silent}", f"default {good}", f"cpu {good}"]


def test_no_index_means_that_uvs_own_is_not_asked_either(fake: Fake) -> None:
    with pytest.raises(Failure, match="no build of torch"):
        fake.choose({"backend": 0}, Settings(no_index=True))
    assert fake.asked == ["cpu", "default"]


@pytest.mark.parametrize(
    ("status", "words", "message"),
    [
        (1, "ERROR: No matching distribution found for torch", "no build of torch 2.13.0 was found"),
        (
            1,
            "WARNING: Retrying after connection broken by X\nERROR: nothing",
            "the package index does not answer",
        ),
    ],
)
def test_pip_is_read_in_the_same_way(status: int, words: str, message: str, tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\nprintf '%s\\n' '{words}' >&2\nexit {status}\n")
    pip.chmod(0o755)
    with pytest.raises(Failure, match=message):
        choose_with_pip([str(pip)], "2.13.0", {"PATH": "/usr/bin:/bin"})


def test_pip_takes_the_cpu_build_or_the_default_one_with_its_libraries(tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\ncase "$*" in *+cpu) exit ${CPU};; esac\n')
    pip.chmod(0o755)
    path = {"PATH": "/usr/bin:/bin"}
    assert choose_with_pip([str(pip)], "2.13.0", {**path, "CPU": "0"}).requirement == "torch==2.13.0+cpu"
    default = choose_with_pip([str(pip)], "2.13.0", {**path, "CPU": "1"})
    assert default.requirement == "torch==2.13.0" and default.libraries
