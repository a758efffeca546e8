"""The locks and the ranges of pyproject.toml agree; what is left out on purpose is in no lock."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements.lock import EXTRAS, LOCKS, PYTHONS, lines, pins

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "requirements"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def locked(name: str, python: str) -> dict[str, str]:
    """Version by name that holds for a version of Python, as pip and uv read the file. Each line is a pin."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    for line in (FOLDER / f"{name}.lock").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (only,) = requirement.specifier
        assert only.operator == "==" and "*" not in only.version and requirement.url is None, line
        if requirement.marker is None or requirement.marker.evaluate(environment):
            key = canonicalize_name(requirement.name)
            assert key not in found, f"{line}: two versions for Python {python}"
            found[key] = only.version
    return found


def ranges(extra: str) -> list[Requirement]:
    """All that the lock with this extra is made from."""
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["build"]]
    for name in (extra, *EXTRAS):
        wanted += optional[name]
    return [Requirement(text) for text in wanted]


def excluded(name: str) -> set[str]:
    files = ["excludes.txt", *(["cpu-excludes.txt"] if name == "cpu" else [])]
    text = [line for file in files for line in (FOLDER / file).read_text().splitlines()]
    return {canonicalize_name(line) for line in text if line and not line.startswith("#")}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_every_range_of_the_project_has_a_pin_in_it(name: str, python: str) -> None:
    versions = locked(name, python)
    for requirement in ranges(LOCKS[name].extra):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.lock: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, locked {version}"


@pytest.mark.parametrize("name", LOCKS)
def test_what_is_left_out_on_purpose_is_not_in_a_lock(name: str) -> None:
    versions = locked(name, "3.11")
    assert excluded(name) and not excluded(name) & versions.keys()
    if name == "cpu":  # whatever new names CUDA's libraries get
        assert not [key for key in versions if key.startswith(("nvidia-", "cuda-", "torchvision", "triton"))]
    else:
        assert {"triton", "torchvision", "nvidia-cublas"} <= versions.keys()


def test_what_both_locks_have_has_one_version_but_where_vllm_disagrees() -> None:
    """The CUDA build of torch on a machine without a GPU takes its libraries' versions from gpu.lock."""
    cpu, gpu = locked("cpu", "3.11"), locked("gpu", "3.11")
    assert {key for key in cpu.keys() & gpu.keys() if cpu[key] != gpu[key]} <= {"apache-tvm-ffi"}
    assert cpu["torch"] == gpu["torch"]


def test_the_extras_say_what_the_locks_are_for() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    assert set(optional) == {"cpu", "gpu", "flash-attn", *EXTRAS}
    assert not [text for text in optional["gpu"] if "flash" in text], (
        "no wheels for new torch: an extra of its own"
    )
    classifiers = PROJECT["project"]["classifiers"]
    assert [text.rpartition(" ")[2] for text in classifiers if "Python ::" in text] == list(PYTHONS)


def test_a_line_per_version_only_where_versions_differ() -> None:
    resolved = {
        "3.11": {"a": "1", "b": "1", "old": "3"},
        "3.12": {"a": "1", "b": "2"},
        "3.13": {"a": "1", "b": "2"},
    }
    assert lines(resolved) == [
        "a==1",
        "b==1 ; python_version == '3.11'",
        "b==2 ; python_version == '3.12' or python_version == '3.13'",
        "old==3 ; python_version == '3.11'",
    ]


def test_the_installer_reads_the_markers_as_pip_does(tmp_path: Path) -> None:
    from requirements import install

    lock = tmp_path / "cpu.lock"
    lock.write_text(
        f"# a comment, a==9\na==1\nb==1 ; python_version == '{install.HERE}' or python_version == '3.99'\n"
        "c==1 ; python_version == '3.99'\n"
    )
    assert install.pinned(lock) == {"a": "1", "b": "1"}
    assert pins(lock) == {"a": "1", "b": "1", "c": "1"}
    for name in LOCKS:
        assert install.pinned(FOLDER / f"{name}.lock").keys() == locked(name, install.HERE).keys()
