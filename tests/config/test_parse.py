"""From the command line to a configuration: files, overrides, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError, Section
from rayrlhf.config.parse import dump_resolved, load_config, load_or_exit
from rayrlhf.config.policy import PolicyRunConfig
from tests.config.conftest import SMALL, Load, Problems


def sections_below(schema: type[Section]) -> list[type[Section]]:
    found: list[type[Section]] = [schema]
    for section in found:
        found += [child for child in section.__subclasses__() if child not in found]
    return found


def test_later_files_win_mappings_merge_and_lists_are_replaced(load: Load) -> None:
    config = load(
        yaml=[
            SMALL + "rollout: {group_size: 2, sampling: {max_new_tokens: 64, stop: [a, b]}}\n",
            "rollout: {sampling: {temperature: 0.7, stop: [c]}}\n",
            "# nothing but a comment\n",
        ]
    )
    assert config.rollout.group_size == 2
    assert config.rollout.sampling.max_new_tokens == 64
    assert config.rollout.sampling.temperature == 0.7
    assert config.rollout.sampling.stop == ["c"]


def test_overrides_win_over_files_and_the_last_one_over_the_others(load: Load) -> None:
    config = load(
        "train.lr=1e-3", "train.lr=2e-4", "reward.sources.0.weight=2", "rollout.sampling.stop=['#', x]"
    )
    assert config.train.lr == 2e-4
    assert config.reward.sources[0].weight == 2.0
    assert config.rollout.sampling.stop == ["#", "x"]


def test_an_override_wins_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert load_config(PolicyRunConfig, ["train.num_steps=3", str(path)]).train.num_steps == 3


def test_a_run_needs_no_file_when_overrides_say_it_all() -> None:
    overrides = [
        "run={name: x}",
        "model.path=m",
        "data.train=p.jsonl",
        "reward.sources=[{type: model, path: r}]",
        "train.num_steps=1",
    ]
    assert load_config(PolicyRunConfig, overrides).run.path == "runs/x"


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("{path: a.jsonl}", ["a.jsonl"]),
        ("[{path: a.jsonl}, b.csv]", ["a.jsonl", "b.csv"]),
    ],
)
def test_sources_are_normalised(given: str, paths: list[str], load: Load) -> None:
    assert [source.path for source in load(f"data.train={given}").data.train] == paths


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", ".000001"])
def test_numbers_as_people_write_them(text: str, load: Load) -> None:
    assert load(f"train.lr={text}").train.lr == 1e-6


def test_an_integer_will_do_for_a_number_and_underscores_may_group_digits(load: Load) -> None:
    config = load("train.max_grad_norm=2", "rollout.kv_cache_bytes=268_435_456")
    assert config.train.max_grad_norm == 2.0 and config.rollout.kv_cache_bytes == 268435456


@pytest.mark.parametrize("name", ["no", "2026-01-01", "a-b_c.1"])
def test_words_that_older_yaml_misreads_are_texts(name: str, load: Load) -> None:
    assert load(f"run.name={name}").run.name == name


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("rollout.group_size=0", "an integer >= 1"),
        ("rollout.group_size=2.0", "an integer >= 1"),
        ("rollout.group_size=true", "an integer >= 1"),
        ("rollout.group_size='2'", "an integer >= 1"),
        ("rollout.group_size=", "an integer >= 1"),
        ("train.lr=true", "a number >= 0"),
        ("train.lr=.nan", "a number >= 0"),
        ("train.lr=.inf", "a number >= 0"),
        ("train.zero_stage=4", "one of 0, 1, 2, 3"),
        ("train.zero_stage=true", "one of 0, 1, 2, 3"),
        ("train.offload_optimizer=1", "true or false"),
        ("train.offload_optimizer=yes", "true or false"),
        ("placement.gpus_per_slot=true", "one of 0, 1, auto"),
        ("algorithm.advantage=GRPO", "one of gae, reinforce_pp, reinforce_pp_baseline, rloo, grpo, dr_grpo"),
        ("algorithm.dual_clip=1", "a number > 1, or null"),
        ("data.input_template=Question", "a text with {} where the prompt goes, or null"),
    ],
)
def test_a_wrong_value_is_reported_with_the_wanted_type(
    override: str, wanted: str, problems: Problems
) -> None:
    key = override.partition("=")[0]
    found = problems(override)
    assert found.keys() == {key}
    assert found[key].wanted == wanted
    assert found[key].where == "command line"


@pytest.mark.parametrize(
    "override",
    [
        "run.name=a/b",
        "run.name=..",
        "run.name=7",
        "run.seed=-1",
        "model.path=",
        "model=tiny",
        "train=null",
        "train.betas=0.9",
        "train.betas=[0.9]",
        "data.train=[]",
        "data.train=null",
        "reward.sources=[]",
        "reward.sources.0.function=length",
        "reward.clip=[a, b]",
        "rollout.sampling.top_p=1.5",
        "rollout.sampling.stop=text",
        "observe.wandb={}",
    ],
)
def test_an_invalid_value_is_reported_once_by_its_key(override: str, problems: Problems) -> None:
    key = override.partition("=")[0]
    found = problems(override)
    assert all(path == key or path.startswith(f"{key}.") for path in found)
    assert all(p.got and p.wanted and p.fix for p in found.values())


def test_got_shows_why_a_number_is_no_integer(problems: Problems) -> None:
    assert problems("train.num_steps=2.0")["train.num_steps"].got == "2.0"


def test_a_key_that_must_be_given_is_not_to_be_removed(problems: Problems) -> None:
    assert "remove" not in problems("train.num_steps=")["train.num_steps"].fix


def test_missing_keys_are_reported_one_by_one(problems: Problems) -> None:
    found = problems(yaml=["rollout: {group_size: 2}\n"])
    assert found.keys() == {"run.name", "model.path", "data.train", "reward.sources", "train.num_steps"}


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("algorithm.kll_coef=0.1", "algorithm.kl_coef"),
        ("rollout.sampling.temprature=1", "rollout.sampling.temperature"),
        ("reward.sources.0.wieght=2", "reward.sources.0.weight"),
        ("train.group_size=4", "rollout.group_size"),
        ("group_size=4", "rollout.group_size"),
        ("max_new_tokens=4", "rollout.sampling.max_new_tokens"),
        ("trian.lr=1", "train"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(
    override: str, meant: str, problems: Problems
) -> None:
    (found,) = problems(override).values()
    assert found.wanted == "no such key"
    assert found.fix.startswith("did you mean ") and meant in found.fix.replace("?", "").split()


def test_an_unknown_key_that_resembles_nothing_lists_its_neighbours(problems: Problems) -> None:
    fix = problems("checkpoint.zzz=1")["checkpoint.zzz"].fix
    assert all(key in fix for key in ("every_steps", "keep", "export"))


def test_a_misspelt_key_is_not_reported_as_missing_too(problems: Problems) -> None:
    assert problems(yaml=[SMALL.replace("num_steps", "num_step")]).keys() == {"train.num_step"}


@pytest.mark.parametrize(
    ("source", "fix"), [("type: modle, path: x", "did you mean model?"), ("path: x", "say ")]
)
def test_an_unknown_type_of_reward(source: str, fix: str, problems: Problems) -> None:
    found = problems(f"reward.sources=[{{{source}}}]")
    assert found.keys() == {"reward.sources.0.type"}
    assert found["reward.sources.0.type"].fix.startswith(fix)


def test_problems_name_file_and_line_or_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SMALL + "rollout:\n  prompts_per_step: 8\n  group_size: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, [str(path), "train.lr=fast"])
    assert {p.path: p.where for p in caught.value.problems} == {
        "rollout.group_size": f"{path}:10",  # SMALL has 7 lines
        "train.lr": "command line",
    }


def test_the_location_is_that_of_the_value_that_wins(problems: Problems) -> None:
    # The override replaces the whole list, so line 6 of the file has nothing to do with it.
    assert ".yaml" not in problems("reward.sources=[{type: modle}]")["reward.sources.0.type"].where


@pytest.mark.parametrize(
    ("text", "line"),
    [("run: {name: x}\nrun: {seed: 1}\n", 2), ("run:\n  name: x\n  seed: 1\n  name: y\n", 4)],
)
def test_a_key_given_twice_is_an_error(text: str, line: int, problems: Problems) -> None:
    found = problems(yaml=[SMALL, text])
    (path,) = found
    assert path in ("run", "run.name")
    assert "twice" in found[path].got and found[path].where.endswith(f"1.yaml:{line}")


@pytest.mark.parametrize("text", ["run:\n  name: [x\nmodel: y\n", "run:\n\tname: x\n", "a: 1\n---\nb: 2\n"])
def test_broken_yaml_is_reported_with_its_line(text: str, problems: Problems) -> None:
    (found,) = problems(yaml=[text]).values()
    assert "broken YAML in line " in found.got


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "just text\n",
        "run: \x00\n",
        "? [a, b]\n: 1\n",
        SMALL + "3: 4\n",
        SMALL + "~: 4\n",
        SMALL + "train.lr: 3\n",
        "run: &run\n  name: *run\n",
        "run: &run\n  <<: *run\n",
        "run: " + "[" * 5000,
        "run: !!python/object/apply:os.getcwd []\n",
    ],
    ids=lambda text: repr(text[-30:]),
)
def test_a_file_that_cannot_be_a_configuration_ends_in_problems(text: str, problems: Problems) -> None:
    assert all(p.got and p.wanted and p.fix for p in problems(yaml=[text]).values())


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, [str(path), "train.num_steps=1"])
    # Only this: with the file unread it is not known which keys are missing.
    assert [problem.path for problem in caught.value.problems] == [str(path)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run.name.x=1", "run.name"),
        ("data.train.0.probability=1", "data.train"),
        ("reward.sources.1.weight=2", "index"),
        ("reward.sources.x.weight=2", "index"),
        ("train.lr=[", "YAML"),
        ("train.num_steps", "key.path=value"),
        ("--train.lr=1", "write train.lr=1"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_an_argument_that_cannot_be_used(argument: str, message: str, problems: Problems) -> None:
    (found,) = problems(argument).values()
    assert message in f"{found.got} {found.wanted} {found.fix}"


def test_no_argument_is_answered_with_the_usage() -> None:
    with pytest.raises(ConfigError, match="at least one YAML file"):
        load_config(PolicyRunConfig, [])


def test_the_error_reads_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(SMALL)
    with pytest.raises(ConfigError) as caught:
        load_config(PolicyRunConfig, ["demo.yaml", "algorithm.kll_coef=0.1", "rollout.group_size=0"])
    assert str(caught.value) == (
        "2 problems in the configuration (demo.yaml + 2 overrides):\n\n"
        "  algorithm.kll_coef  (command line)\n"
        "    got:    0.1\n"
        "    wanted: no such key\n"
        "    fix:    did you mean algorithm.kl_coef?\n\n"
        "  rollout.group_size  (command line)\n"
        "    got:    0\n"
        "    wanted: an integer >= 1\n"
        "    fix:    set rollout.group_size to 1 or more"
    )


def test_problems_go_to_stderr_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(PolicyRunConfig, ["nowhere.yaml"])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == "" and "nowhere.yaml" in output.err and "Traceback" not in output.err


def test_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(PolicyRunConfig, ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for section in sections_below(PolicyRunConfig):
        for name, info in section.model_fields.items():
            assert f".{name}" in text or f"\n{name}" in text
            assert info.description and info.description.split()[0] in text


def test_every_field_has_a_docstring_of_one_line() -> None:
    import rayrlhf.config.policy  # noqa: F401  (it imports every section of the tree)

    for section in sections_below(Section)[1:]:
        for name, info in section.model_fields.items():
            assert info.description and "\n" not in info.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    "text", ["1e-6", "1e5", "+.5e3", "no", "2026-01-01", "1:30", "~", "", "a: b\n  # c\n", "0x1F"]
)
def test_the_resolved_configuration_loads_to_the_same(text: str, load: Load, tmp_path: Path) -> None:
    small = load("algorithm.advantage=grpo", "rollout.group_size=2", "reward.clip=[-1, 1]", "train.lr=1e-7")
    config = PolicyRunConfig.model_validate(
        small.model_dump() | {"data": {"train": ["p.jsonl"], "system_prompt": text}}
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(PolicyRunConfig, [str(path)]) == config


def test_a_configuration_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
