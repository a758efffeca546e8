"""Files, merging, overrides: what the command line becomes, before any schema looks at it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.yaml_tree import COMMAND_LINE, read_tree
from rayrlhf.migration.other_keys import option_problem


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


def test_later_files_win_key_by_key_and_replace_lists(write: Any) -> None:
    lower = write("lower.yaml", "train: {lr: 0.1, betas: [0.1, 0.2]}\nmodel: {path: a}\n")
    upper = write("upper.yaml", "train: {betas: [0.3]}\nmodel: {dtype: auto}\nrun: {name: x}\n")
    tree = read_tree([lower, upper])
    assert tree.values == {
        "train": {"lr": 0.1, "betas": [0.3]},
        "model": {"path": "a", "dtype": "auto"},
        "run": {"name": "x"},
    }
    assert tree.source == f"{lower} + {upper}"


def test_a_null_removes_a_section_of_an_earlier_file(write: Any) -> None:
    tree = read_tree([write("a.yaml", "critic: {lr: 0.1}\n"), write("b.yaml", "critic: null\n")])
    assert tree.values == {"critic": None}


def test_overrides_come_after_all_files_wherever_they_are(write: Any) -> None:
    path = write("a.yaml", "train: {lr: 0.1, num_steps: 3}\n")
    tree = read_tree(["train.lr=0.5", path, "train.num_steps=4", "train.num_steps=5"])
    assert tree.values == {"train": {"lr": 0.5, "num_steps": 5}}
    assert tree.source == f"{path} + 3 overrides"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("010", 10),  # an octal 8 in YAML 1.1
        ("1e-6", 1e-6),  # a text in YAML 1.1
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),  # false in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2026-01-01", "2026-01-01"),  # a date in YAML 1.1
        ("'3'", "3"),
        ("[1, a]", [1, "a"]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("a=b", "a=b"),
        ("jsonl@dir/file", "jsonl@dir/file"),
    ],
)
def test_override_values_are_yaml(text: str, value: Any) -> None:
    found = read_tree([f"a.b={text}"]).values["a"]["b"]
    assert found == value and type(found) is type(value)


def test_overrides_create_missing_sections(write: Any) -> None:
    path = write("a.yaml", "critic: null\n")
    assert read_tree([path, "critic.lr=0.1", "a.b.c=1"]).values == {
        "critic": {"lr": 0.1},
        "a": {"b": {"c": 1}},
    }


def test_overrides_reach_list_items_by_index(write: Any) -> None:
    path = write("a.yaml", "sources: [{path: a}, {path: b}]\n")
    assert read_tree([path, "sources.1.path=c"]).values == {"sources": [{"path": "a"}, {"path": "c"}]}


def test_an_override_leaves_the_other_user_of_a_yaml_anchor_alone(write: Any) -> None:
    path = write("a.yaml", "a: &shared {x: 1}\nb: *shared\n")
    assert read_tree([path, "a.x=2"]).values == {"a": {"x": 2}, "b": {"x": 1}}


def test_merge_keys_work_and_are_not_duplicates(write: Any) -> None:
    path = write("a.yaml", "a: &base {x: 1, y: 1}\nb:\n  <<: *base\n  y: 2\n")
    tree = read_tree([path])
    assert tree.values["b"] == {"x": 1, "y": 2} and tree.problems == []


def test_an_override_that_is_not_yaml_is_an_error() -> None:
    (problem,) = read_tree(["a.b=[1"]).problems
    assert problem.path == "a.b" and problem.got.startswith("[1 (")
    assert problem.fix == "put quotes around it: a.b='\"[1\"'"
    assert read_tree(['a.b="[1"']).values == {"a": {"b": "[1"}}  # what the fix makes of it, behind the shell


def test_an_option_is_answered_with_the_override_it_stands_for() -> None:
    (option,) = read_tree(["--train.num-steps=1e-3"]).options
    problem = option_problem(PolicyRunConfig, *option, COMMAND_LINE)
    assert problem.fix == "write train.num_steps=1e-3, without dashes"


def test_broken_yaml_is_reported_with_its_line(write: Any) -> None:
    path = write("a.yaml", "run:\n  name: demo\n  dir: [a, b\ntrain:\n  lr: 1\n")
    tree = read_tree([path])
    (problem,) = tree.problems
    assert problem.where == f"{path}:4"  # the first line that cannot belong to the open list
    assert "train:" in problem.got
    assert "line 4" in problem.fix
    assert tree.unreadable


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "a list"), ("hello\n", "a text"), ("3\n", "a number")])
def test_the_top_level_must_be_a_mapping(write: Any, text: str, kind: str) -> None:
    (problem,) = read_tree([write("a.yaml", text)]).problems
    assert problem.got == f"{kind} at the top level"


def test_an_empty_file_is_an_empty_configuration(write: Any) -> None:
    tree = read_tree([write("a.yaml", "# nothing yet\n")])
    assert tree.values == {} and tree.problems == [] and not tree.unreadable


def test_duplicate_keys_are_errors_with_both_lines(write: Any) -> None:
    path = write("a.yaml", "train:\n  lr: 1\n  num_steps: 2\n  lr: 3\nrun: {name: a, name: b}\ntrain: {}\n")
    tree = read_tree([path])
    assert [(p.path, p.got, p.where) for p in tree.problems] == [
        ("train.lr", "given twice, in lines 2 and 4", f"{path}:4"),
        ("run.name", "given twice, in lines 5 and 5", f"{path}:5"),
        ("train", "given twice, in lines 1 and 6", f"{path}:6"),
    ]


def test_every_value_knows_where_it_was_given(write: Any) -> None:
    lower = write("a.yaml", "train:\n  lr: 1\n  betas:\n  - 1\n  - 2\n")
    upper = write("b.yaml", "\ntrain: {num_steps: 3}\n")
    tree = read_tree([lower, upper, "train.lr=2"])
    assert tree.places["train.betas.1"] == f"{lower}:5"
    assert tree.places["train.num_steps"] == f"{upper}:2"
    assert tree.places["train.lr"] == "command line"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases"),  # ten lines that expand to 10^10 values; it never ended
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, " * 9 + "x", "{k: 1}"), "aliases"),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, "nested deeper than 40"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: !!python/object/apply:os.system ['true']", "remove the tag"),
        ("a: !!set {x}", "remove the tag"),
        ("a: !!timestamp x", "remove the tag"),
        ("a: !!int x", "remove the tag"),
        ("a: !!bool maybe", "remove the tag"),
        ("a: !!float fast", "remove the tag"),
        ("a: !mine x", "remove the tag"),
    ],
    ids=lambda text: text[-24:],
)
def test_hostile_yaml_is_refused_within_a_second(text: str, message: str, write: Any) -> None:
    before = time.process_time()
    tree = read_tree([write("a.yaml", text)])
    assert time.process_time() - before < 1.0  # milliseconds, but for the bombs' 10,000 values
    (problem,) = tree.problems
    assert tree.unreadable and message in f"{problem.got} {problem.wanted} {problem.fix}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {name: x}\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00", "a zero byte at position 8"),
        (b"run: {name: caf\xe9}\n", "'utf-8' codec"),
        (b"# " + b"x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_not_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    (problem,) = read_tree([str(path)]).problems
    assert message in problem.got


def test_a_device_is_read_up_to_the_limit() -> None:
    (problem,) = read_tree(["/dev/zero"]).problems
    assert "more than" in problem.got


def test_escape_codes_of_keys_and_values_are_escaped(write: Any) -> None:
    tree = read_tree([write("a.yaml", '{"run\\e[2J": 1, "run\\e[2J": 2}')])
    (problem,) = tree.problems
    assert "\x1b" not in str(problem) and "\\x1b[2J" in str(problem)
