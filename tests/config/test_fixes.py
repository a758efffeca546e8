"""Error messages of invalid values, verbatim: what was got, what is wanted, how to fix it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rayrlhf.config.parse import dump_resolved, load_config
from rayrlhf.config.policy import PolicyRunConfig
from tests.config.conftest import SMALL, Load, Problems

KEY = ""  # the problem's path is the key of the override


@pytest.mark.parametrize(
    ("override", "path", "got", "wanted", "fix"),
    [
        ("rollout.group_size=two", KEY, "'two'", "an integer >= 1", "write a plain number, without quotes"),
        ("rollout.group_size=2.0", KEY, "2.0", "an integer >= 1", "write a plain number"),
        ("rollout.group_size=true", KEY, "true", "an integer >= 1", "write a plain number"),
        ("rollout.group_size=null", KEY, "null", "an integer >= 1", "remove the key to get the default, 1"),
        ("train.num_steps=null", KEY, "null", "an integer >= 1", "give it a value"),
        ("train.lr=-1", KEY, "-1", "a number >= 0", "set train.lr to 0 or more"),
        ("train.lr=true", KEY, "true", "a number >= 0", "write a plain number"),
        ("train.lr='\"1e-6\"'", KEY, "'\"1e-6\"'", "a number >= 0", "without quotes"),
        ("train.lr=.nan", KEY, "nan", "a number >= 0", "write a plain number"),
        ("train.eps=0", KEY, "0", "a number > 0", "set train.eps above 0"),
        ("algorithm.lam=1.5", KEY, "1.5", "a number >= 0 and <= 1", "set algorithm.lam to 1 or less"),
        ("algorithm.dual_clip=1", KEY, "1", "a number > 1, or null", "set algorithm.dual_clip above 1"),
        ("train.betas=[0.9, 1]", "train.betas.1", "1", "a number >= 0 and < 1", "set train.betas.1 below 1"),
        ("train.betas=[0.9]", KEY, "[0.9]", "a list of two numbers >= 0 and < 1", "write a list of two"),
        ("train.betas=0.9", KEY, "0.9", "a list of two numbers >= 0 and < 1", "write a list"),
        ("train.zero_stage=4", KEY, "4", "one of 0, 1, 2, 3", "set train.zero_stage to one of them"),
        ("train.zero_stage=true", KEY, "true", "one of 0, 1, 2, 3", "write one of 0, 1, 2, 3"),
        ("placement.gpus_per_slot=true", KEY, "true", "one of 0, 1, auto", "write one of 0, 1, auto"),
        ("algorithm.advantage=GRP0", KEY, "'GRP0'", "one of gae, reinforce_pp,", "did you mean grpo?"),
        ("model.path=3", KEY, "3", "a text that is not empty", "put it in quotes: '3' in a file"),
        ("model.path=''", KEY, "''", "a text that is not empty", "write a text that is not empty"),
        ("run.name=a/b", KEY, "'a/b'", "letters, digits, '.', '_' and '-'", "write letters"),
        ("run.name=..", KEY, "'..'", "letters, digits, '.', '_' and '-'", "write letters"),
        ("data.shuffle='\"no\"'", KEY, "'\"no\"'", "true or false", "write true or false"),
        ("data.shuffle=no", KEY, "'no'", "true or false", "write true or false"),
        ("data.shuffle=1", KEY, "1", "true or false", "write true or false"),
        (
            "data.input_template=x",
            KEY,
            "'x'",
            "a text with {} where the prompt goes",
            "write a text with {}",
        ),
        ("data.train=[]", KEY, "[]", "a path, or a list of paths", "write a path"),
        ("data.train=3", KEY, "3", "a path, or a list of paths", "write a list"),
        (
            "rollout.sampling=3",
            KEY,
            "3",
            "a section with the keys temperature",
            "rollout.sampling.temperature=",
        ),
        ("rollout.sampling.stop=x", KEY, "'x'", "a list (each item a text)", "write a list"),
        ("reward.sources=[]", KEY, "[]", "a list that is not empty", "write a list that is not empty"),
        ("reward.sources.0=3", KEY, "3", "a section with type: function or model", "write a section"),
        ("reward.sources.0.type=modle", KEY, "'modle'", "one of function, model", "did you mean model?"),
        (
            "reward.sources.0.function=f",
            KEY,
            "'f'",
            "module:function or path/to/file.py:function",
            "write module",
        ),
        ("reward.sources.0.weight=x", KEY, "'x'", "a number", "for example reward.sources.0.weight=1"),
        ("reward.clip=[1]", KEY, "[1]", "a list of 2 (each a number), or null", "write a list of 2"),
    ],
)
def test_a_bad_value(override: str, path: str, got: str, wanted: str, fix: str, problems: Problems) -> None:
    key = path or override.partition("=")[0]
    found = problems(override)
    assert found.keys() == {key}
    assert found[key].got == got
    assert found[key].wanted.startswith(wanted)
    assert fix in found[key].fix


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("train.group_size=2", "did you mean rollout.group_size?"),  # the same name in another section
        ("rollout.temperature=1", "did you mean rollout.sampling.temperature?"),  # … further down in this one
        ("data.lr=1", "did you mean critic.lr or train.lr?"),  # … in two other sections
        ("data.grup_size=2", "did you mean rollout.group_size?"),  # a similar name in another section
    ],
)
def test_a_suggestion_is_a_whole_path(override: str, fix: str, problems: Problems) -> None:
    (found,) = problems(override).values()
    assert found.fix == fix


def test_a_renamed_key_is_answered_with_its_new_name(problems: Problems) -> None:
    old = "algorithm.dynamic_sampling.max_draws"
    found = problems(f"{old}=2")[old]
    assert found.fix == "did you mean algorithm.dynamic_sampling.max_prompt_batches?"


def test_a_misspelt_section_is_reported_once(problems: Problems) -> None:
    found = problems(yaml=[SMALL.replace("model:", "modell:")])
    assert {path: problem.fix for path, problem in found.items()} == {"modell": "did you mean model?"}


def test_a_dotted_key_in_a_file_should_be_nested(problems: Problems) -> None:
    found = problems(yaml=[SMALL, "train.lr: 1.0\n"])["train.lr"]
    assert "nest it" in found.fix and found.where.endswith("1.yaml:1")


def test_an_override_that_failed_is_not_reported_as_missing_too(problems: Problems) -> None:
    found = problems("train.num_steps=[", yaml=[SMALL.replace("{num_steps: 10}", "{}")])
    assert found.keys() == {"train.num_steps"} and "YAML" in found["train.num_steps"].wanted


def test_problems_of_every_kind_come_together(problems: Problems) -> None:
    text = """\
run: {name: test}
model: {path: x, path: y}  # given twice
data: {train: a.jsonl, max_prompt_tokens: 0}  # out of bounds
algorithm: {advantage: grpo, foo_bar: 1, kl_target: 1}  # unknown key; fixed, with a target
reward: {sources: [{type: function, function: "a:b"}]}
train: {num_workers: 3}  # no num_steps; 64 prompts are not for 3 workers, nor groups of 1 for grpo
critic: {}  # grpo has none
rollout: {group_size: 1}
"""
    assert problems("bare", "run.name.x=1", yaml=[text]).keys() == {
        "bare",
        "run.name.x",
        "model.path",
        "data.max_prompt_tokens",
        "algorithm.foo_bar",
        "algorithm.kl_target",
        "train.num_steps",
        "rollout.group_size",
        "rollout.prompts_per_step",
        "critic",
    }


def test_the_resolved_configuration_reads_the_same_in_yaml_1_1(load: Load, tmp_path: Path) -> None:
    texts = ["1e6", "no", "010", "08", "1:30", "null", "{}", "ünï", " x ", "#"]
    quoted = ", ".join(f"'{text}'" for text in texts)
    config = load(f"rollout.sampling.stop=[{quoted}]", "run.name='1e6'", "train.lr=3e-7")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(PolicyRunConfig, [str(path)]) == config
    resolved = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert resolved["rollout"]["sampling"]["stop"] == texts
    assert resolved["run"]["name"] == "1e6" and resolved["train"]["lr"] == 3e-7
    wanted = {"every_steps": "auto", "keep": 2, "optimizer": True, "asynchronous": False}
    assert resolved["checkpoint"] == {**wanted, "export": True, "best": True}
