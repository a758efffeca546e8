"""What a user is told: every problem at once, each with its key, what it got, what it wanted and the fix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.config.load import ConfigError, Problem, dump_resolved, load_config, load_or_exit
from rayrlhf.config.run import PolicyRunConfig

SMALLEST: dict[str, Any] = {
    "run": {"name": "test"},
    "model": {"path": "models/tiny"},
    "data": {"train": "prompts.jsonl"},
    "reward": {"sources": [{"type": "function", "function": "rewards:length"}]},
    "train": {"num_steps": 10},
}


@pytest.fixture
def smallest(tmp_path: Path) -> str:
    path = tmp_path / "smallest.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return str(path)


def problems_of(*argv: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, list(argv))
    return caught.value.problems


def problem_of(*argv: str) -> Problem:
    problems = problems_of(*argv)
    assert len(problems) == 1, problems
    return problems[0]


def test_the_smallest_config_loads_with_defaults(smallest: str) -> None:
    config = load_config(PolicyRunConfig, [smallest])
    assert config.run.path == "runs/test"
    assert config.rollout.prompts_per_step == 64
    assert config.eval.sampling.temperature == 0.0 and config.rollout.sampling.temperature == 1.0
    assert config.train.betas == (0.9, 0.95)


def test_two_problems_are_told_together_word_for_word(smallest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, [smallest, "algorithm.kll_coef=0.1", "rollout.group_size=0"])
    assert str(caught.value) == (
        f"2 problems in the configuration ({smallest} + 2 overrides):\n"
        "\n"
        "  algorithm.kll_coef  (command line)\n"
        "    got:    0.1\n"
        "    wanted: no such key\n"
        "    fix:    did you mean algorithm.kl_coef?\n"
        "\n"
        "  rollout.group_size  (command line)\n"
        "    got:    0\n"
        "    wanted: an integer >= 1\n"
        "    fix:    set rollout.group_size to 1 or more"
    )


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("algorithm.kll_coef=1", "algorithm.kl_coef"),  # similar, in its section
        ("train.group_size=2", "rollout.group_size"),  # the same, in another section
        ("rollout.temperature=1", "rollout.sampling.temperature"),  # the same, further down
        ("data.lr=1", "critic.lr or train.lr"),  # the same, in two sections
        ("data.grup_size=2", "rollout.group_size"),  # similar, in another section
        ("algoritm.kl_coef=1", "algorithm"),  # a section
        ("reward.sources.0.wieght=1", "reward.sources.0.weight"),  # in a list item
        ("eval.sampling.max_new_token=3", "eval.sampling.max_new_tokens"),
    ],
)
def test_unknown_keys_are_answered_with_the_key_that_was_meant(
    smallest: str, override: str, suggested: str
) -> None:
    problem = problem_of(smallest, override)
    assert problem.wanted == "no such key"
    assert problem.fix == f"did you mean {suggested}?"


def test_an_unknown_key_like_no_other_is_answered_with_the_keys_there_are(smallest: str) -> None:
    assert (
        problem_of(smallest, "checkpoint.zzz=1").fix
        == "remove it; checkpoint has the keys every_steps, keep, export"
    )


def test_a_misspelt_key_is_not_reported_as_missing_too(smallest: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(SMALLEST)
    broken["train"] = {"num_step": 3}
    broken["modell"] = broken.pop("model")
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(broken))
    assert {p.path: p.fix for p in problems_of(str(path))} == {
        "train.num_step": "did you mean train.num_steps?",
        "modell": "did you mean model?",
    }


def test_a_misspelt_key_silences_the_checks_that_need_its_value(smallest: str) -> None:
    # The default group size of 1 would contradict grpo, but the user did give one.
    problem = problem_of(smallest, "algorithm.advantage=grpo", "rollout.group_sise=8")
    assert problem.path == "rollout.group_sise"
    assert PolicyRunConfig.model_validate(SMALLEST).rollout.group_size == 1  # the shared default is untouched


def test_dotted_keys_in_a_file_are_answered_with_nesting(smallest: str, tmp_path: Path) -> None:
    path = tmp_path / "dotted.yaml"
    path.write_text("train.lr: 1.0\n")
    problem = problem_of(smallest, str(path))
    assert problem.path == "train.lr" and "nest it" in problem.fix
    assert problem.where == f"{path}:1"


@pytest.mark.parametrize(
    ("override", "path", "got", "wanted", "fix"),
    [
        ("rollout.group_size=two", None, "'two'", "an integer >= 1", "write a plain number, without quotes"),
        ("rollout.group_size=2.0", None, "2.0", "an integer >= 1", "write a plain number"),
        ("rollout.group_size=true", None, "true", "an integer >= 1", "write a plain number"),
        ("rollout.group_size=null", None, "null", "an integer >= 1", "remove the key to get the default, 1"),
        ("train.num_steps=null", None, "null", "an integer >= 1", "give it a value"),
        ("train.lr=-1", None, "-1", "a number >= 0", "set train.lr to 0 or more"),
        ("train.lr=true", None, "true", "a number >= 0", "write a plain number"),
        ("train.lr='\"1e-6\"'", None, "'\"1e-6\"'", "a number >= 0", "without quotes"),
        ("train.lr=.nan", None, "nan", "a number >= 0", "write a plain number"),
        ("train.eps=0", None, "0", "a number > 0", "set train.eps above 0"),
        ("algorithm.lam=1.5", None, "1.5", "a number >= 0 and <= 1", "set algorithm.lam to 1 or less"),
        ("algorithm.dual_clip=1", None, "1", "a number > 1, or null", "set algorithm.dual_clip above 1"),
        ("train.betas=[0.9, 1]", "train.betas.1", "1", "a number >= 0 and < 1", "set train.betas.1 below 1"),
        ("train.betas=[0.9]", None, "[0.9]", "a list of two numbers >= 0 and < 1", "write a list of two"),
        ("train.betas=0.9", None, "0.9", "a list of two numbers >= 0 and < 1", "write a list"),
        ("train.zero_stage=4", None, "4", "one of 0, 1, 2, 3", "set train.zero_stage to one of them"),
        ("train.zero_stage=true", None, "true", "one of 0, 1, 2, 3", "write one of 0, 1, 2, 3"),
        ("placement.gpus_per_slot=true", None, "true", "one of 0, 1, auto", "write one of 0, 1, auto"),
        ("algorithm.advantage=GRP0", None, "'GRP0'", "one of gae, reinforce_pp,", "did you mean grpo?"),
        ("model.path=3", None, "3", "a text that is not empty", "put it in quotes: '3' in a file"),
        ("model.path=''", None, "''", "a text that is not empty", "write a text that is not empty"),
        ("run.name=a/b", None, "'a/b'", "letters, digits, '.', '_' and '-'", "write letters"),
        ("run.name=..", None, "'..'", "letters, digits, '.', '_' and '-'", "write letters"),
        ("data.shuffle='\"no\"'", None, "'\"no\"'", "true or false", "write true or false"),
        ("data.shuffle=no", None, "'no'", "true or false", "write true or false"),
        ("data.shuffle=1", None, "1", "true or false", "write true or false"),
        (
            "data.input_template=x",
            None,
            "'x'",
            "a text with {} where the prompt goes",
            "write a text with {}",
        ),
        ("data.train=[]", None, "[]", "a path, or a list of paths", "write a path"),
        ("data.train=3", None, "3", "a path, or a list of paths", "write a list"),
        (
            "rollout.sampling=3",
            None,
            "3",
            "a section with the keys temperature",
            "rollout.sampling.temperature=",
        ),
        ("rollout.sampling.stop=x", None, "'x'", "a list (each item a text)", "write a list"),
        ("reward.sources=[]", None, "[]", "a list that is not empty", "write a list that is not empty"),
        ("reward.sources.0=3", None, "3", "a section with type: function or model", "write a section"),
        ("reward.sources.0.type=modle", None, "'modle'", "one of function, model", "did you mean model?"),
        (
            "reward.sources.0.function=f",
            None,
            "'f'",
            "module:function or path/to/file.py:function",
            "write module",
        ),
        ("reward.sources.0.weight=x", None, "'x'", "a number", "for example reward.sources.0.weight=1"),
        ("reward.clip=[1]", None, "[1]", "a list of 2 (each a number), or null", "write a list of 2"),
    ],
)
def test_bad_values(smallest: str, override: str, path: str | None, got: str, wanted: str, fix: str) -> None:
    problem = problem_of(smallest, override)
    assert problem.path == (path or override.partition("=")[0])
    assert problem.got == got
    assert problem.wanted.startswith(wanted)
    assert fix in problem.fix


def test_a_source_without_a_type_is_asked_for_it(smallest: str) -> None:
    problem = problem_of(smallest, "reward.sources=[{path: x}]")
    assert (problem.path, problem.got) == ("reward.sources.0.type", "nothing")
    assert problem.wanted == "one of function, model"


def test_missing_sections_are_told_by_the_keys_that_must_be_given() -> None:
    problems = problems_of("rollout.group_size=1")
    assert [p.path for p in problems] == [
        "run.name",
        "model.path",
        "data.train",
        "reward.sources",
        "train.num_steps",
    ]
    assert all(p.got == "nothing" for p in problems)


def test_the_place_of_a_problem_is_told(smallest: str, tmp_path: Path) -> None:
    path = tmp_path / "upper.yaml"
    path.write_text("train:\n  num_steps: 3\n  lr: x\n")
    assert problem_of(smallest, str(path)).where == f"{path}:3"
    assert problem_of(smallest, "train.lr=x").where == "command line"


def test_problems_of_every_kind_come_together(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "run: {name: test}\n"
        "model: {path: x, path: y}\n"  # duplicate
        "data: {train: a.jsonl, max_prompt_tokens: 0}\n"  # bad value
        "algorithm: {advantage: grpo, foo_bar: 1, kl_target: 1}\n"  # unknown key; contradiction
        "reward: {sources: [{type: function, function: 'a:b'}]}\n"
        "train: {num_workers: 3}\n"  # num_steps missing; 64 prompts do not divide by 3
        "critic: {}\n"  # grpo has none
    )
    problems = problems_of(str(path), "bare", "run.name.x=1")
    assert sorted(p.path for p in problems) == sorted(
        [
            "model.path",
            "bare",
            "run.name.x",
            "data.max_prompt_tokens",
            "algorithm.foo_bar",
            "algorithm.kl_target",
            "train.num_steps",
            "rollout.group_size",
            "rollout.prompts_per_step",
            "critic",
        ]
    )


def test_an_unreadable_file_stops_the_search_for_missing_keys(smallest: str) -> None:
    assert [p.path for p in problems_of("nowhere.yaml", "foo")] == ["nowhere.yaml", "foo"]


def test_an_override_that_failed_is_not_reported_as_missing_too(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "train": {}}))
    assert [p.path for p in problems_of(str(path), "train.num_steps=[")] == ["train.num_steps"]


def test_no_arguments_are_answered_with_the_usage() -> None:
    problem = problem_of()
    assert "CONFIG.yaml" in problem.fix and "--help" in problem.fix


def test_load_or_exit_prints_to_stderr_and_exits_with_2(
    smallest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(PolicyRunConfig, [smallest, "rollout.group_size=0"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("1 problem in the configuration") and "set rollout.group_size to 1 or more" in err


def test_the_resolved_config_loads_to_an_equal_one(smallest: str, tmp_path: Path) -> None:
    texts = ["1e6", "no", "010", "08", "1:30", "null", "{}", "a: b", "ünï", "<|end|>", " x ", "#", "\n\n"]
    stop = "rollout.sampling.stop=" + yaml.safe_dump(texts, default_flow_style=True, allow_unicode=True)
    # safe_dump writes YAML 1.1: quote what only YAML 1.2 reads as a number.
    stop = stop.replace("1e6", "'1e6'").replace(" 08", " '08'")
    config = load_config(
        PolicyRunConfig,
        [
            smallest,
            stop,
            "run.name='1e6'",
            "train.lr=3e-7",
            "reward.clip=[-1, 1]",
            "data.eval=[a, b]",
            "eval.num_prompts=3",
        ],
    )
    assert config.rollout.sampling.stop == texts
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(config))
    assert load_config(PolicyRunConfig, [str(path)]) == config
    resolved = yaml.safe_load(path.read_text())
    assert resolved["train"]["lr"] == 3e-7 and resolved["run"]["name"] == "1e6"  # for other readers as well
    assert resolved["checkpoint"] == {"every_steps": None, "keep": 2, "export": True}


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_the_resolved_config_names_the_critic_and_ref_it_uses(
    smallest: str, tmp_path: Path, advantage: str
) -> None:
    overrides = [f"algorithm.advantage={advantage}", "rollout.group_size=2", "algorithm.kl_coef=0"]
    config = load_config(PolicyRunConfig, [smallest, *overrides])
    assert (config.critic is not None) == config.needs_critic == (advantage == "gae")
    assert config.ref is None and not config.needs_ref
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(config))
    assert load_config(PolicyRunConfig, [str(path)]) == config
    assert load_config(PolicyRunConfig, [smallest]).ref is not None
