"""The words of TRL, verl and OpenRLHF are answered with ours, from the table that docs/migration.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.help import keys_of
from rayrlhf.config.job_kinds import SCHEMAS, load_any
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import SftRunConfig
from rayrlhf.migration.other_keys import find_words
from rayrlhf.migration.page import page
from rayrlhf.migration.table import PROJECTS, Word
from tests.config.conftest import SMALL, Problems

REPOSITORY = Path(__file__).parents[2]
ALL_KEYS = {key.path for schema in SCHEMAS.values() for key in keys_of(schema)}
WORDS = [(project, word) for project, words in PROJECTS.items() for word in words]


def test_the_page_is_fresh() -> None:
    assert (REPOSITORY / "docs" / "migration.md").read_text(encoding="utf-8") == page(), "run `make rendered`"


def test_every_key_of_the_table_exists() -> None:
    assert [
        (project, word.theirs, key) for project, word in WORDS for key in word.keys if key not in ALL_KEYS
    ] == []


def test_every_value_of_the_table_is_one_that_we_take() -> None:
    """`algorithm.kl_in=loss`: the value is among those that the key wants."""
    wanted = {key.path: key.wanted for schema in SCHEMAS.values() for key in keys_of(schema)}
    for _, word in WORDS:
        for text in word.ours:
            key, equals, value = text.partition("=")
            # Two jobs may give a key other values; this one's are those of the last, so look at numbers only.
            if equals and not value.isdecimal():
                schemas = [s for s in SCHEMAS.values() if key in {k.path for k in keys_of(s)}]
                texts = [k.wanted for s in schemas for k in keys_of(s) if k.path == key]
                assert any(value in text for text in texts), (text, wanted[key])


def test_no_word_stands_twice_and_each_says_something() -> None:
    for words in PROJECTS.values():
        names = [word.theirs for word in words]
        assert sorted(set(names)) == sorted(names)
        assert all(word.ours or word.how for word in words)


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("learning_rate=1e-5", "train.lr"),
        ("train.learning_rate=1e-5", "train.lr"),
        ("n_samples_per_prompt=4", "rollout.group_size"),
        ("num_generations=4", "rollout.group_size"),
        ("beta=0.1", "algorithm.kl_coef"),
        ("algorithm.adv_estimator=grpo", "algorithm.advantage"),
        ("adv_estimator=grpo", "algorithm.advantage"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "algorithm.kl_coef"),
        ("per_device_train_batch_size=2", "rollout.prompts_per_step"),
        ("actor_rollout_ref.rollout.n=4", "rollout.group_size"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "train.lr"),
        ("rollout.tensor_model_parallel_size=2", "rollout.tensor_parallel"),
    ],
)
def test_a_key_of_another_project_is_answered_with_ours(override: str, ours: str, problems: Problems) -> None:
    found = problems(override)
    assert found.keys() == {override.partition("=")[0]}
    (problem,) = found.values()
    assert problem.fix.startswith(f"use {ours} ("), problem.fix


def test_where_the_meaning_differs_it_says_how_to_convert(problems: Problems) -> None:
    (problem,) = problems("micro_train_batch_size=4").values()
    assert "tokens, not samples" in problem.fix
    (problem,) = problems("gradient_accumulation_steps=4").values()
    assert problem.fix.startswith("leave it out") and "TRL" in problem.fix


def test_a_section_of_verl_is_answered_key_by_key(problems: Problems) -> None:
    verl = "actor_rollout_ref: {model: {path: m}, actor: {optim: {lr: 1e-6}, zzz: 1}}\n"
    found = problems(yaml=[SMALL.replace("model: {path: models/tiny}\n", ""), verl])
    fixes = {path.rpartition(".")[2]: problem.fix for path, problem in found.items()}
    assert fixes["path"].startswith("use model.path (") and fixes["lr"].startswith("use train.lr (")
    assert fixes["zzz"].startswith("remove it")
    assert len(found) == 3  # and not that model.path is missing


def test_words_of_ours_are_not_taken_for_others() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, ["rollout.temperature=1"])
    assert "did you mean rollout.sampling.temperature?" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "option", "fix"),
    [
        (["--model_name_or_path", "m"], "--model_name_or_path", "use model.path ("),
        (["--learning_rate=1e-5"], "--learning_rate", "use train.lr ("),
        (["--pretrain", "m"], "--pretrain", "use model.path ("),
        (
            ["--zero_stage", "3"],
            "--zero_stage",
            "did you mean train.zero_stage? Write it as train.zero_stage=3",
        ),
        (["--packing"], "--packing", "leave it out"),
        (["--train.lr", "1"], "--train.lr", "write train.lr=1, without dashes"),
        (["--group-size", "2"], "--group-size", "did you mean rollout.group_size?"),
        (["+trainer.total_training_steps=3"], "+trainer.total_training_steps", "use train.num_steps ("),
        (["--zzz"], "--zzz", "leave it out"),
    ],
)
def test_options_are_answered_with_the_override(argv: list[str], option: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, ["jobs/configs/demo.yaml", *argv])
    (problem,) = caught.value.problems
    assert problem.path == option and problem.fix.startswith(fix), problem.fix


def test_an_option_does_not_swallow_files_and_overrides() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(SftRunConfig, ["--bf16", "jobs/configs/sft-cpu.yaml", "--packing", "train.lr=x"])
    assert [problem.path for problem in caught.value.problems] == ["--bf16", "--packing", "train.lr"]


def test_commands_for_any_job_answer_options_too() -> None:
    with pytest.raises(ConfigError) as caught:
        load_any(["jobs/configs/sft-cpu.yaml", "--learning_rate", "1e-5"])
    assert [problem.path for problem in caught.value.problems] == ["--learning_rate"]


def test_short_words_of_long_paths_say_nothing() -> None:
    """verl's `actor_rollout_ref.rollout.n`: an `n` alone is no word of verl's."""
    assert find_words("n") == [] and find_words("path") == [] and find_words("enable") == []
    assert find_words("rollout.n") == [("verl", Word("actor_rollout_ref.rollout.n", ("rollout.group_size",)))]
