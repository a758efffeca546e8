"""`reward` in the configuration: one good value and one refused for every rule, and what a driver checks."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from pydantic import ValidationError

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.reward import RewardConfig, check_reward_needs
from rayrlhf.reward.items import RewardError
from rayrlhf.runtime.preflight import check_before_ray, try_rewards
from tests.samples import make_config, make_prompt

FUNCTION = {"type": "function", "function": "rewards:length"}
REMOTE = {"type": "remote", "urls": ["http://judge:8000/score"]}


def load(*sources: dict[str, Any], **reward: Any) -> RewardConfig:
    return RewardConfig.model_validate({"sources": list(sources or [FUNCTION]), **reward})


def problem(*sources: dict[str, Any], **reward: Any) -> Problem:
    with pytest.raises(ValidationError) as caught:
        load(*sources, **reward)
    [detail] = caught.value.errors()
    cause = detail.get("ctx", {}).get("error")
    assert isinstance(cause, ConfigError)
    [found] = cause.problems
    return found


def test_every_kind_of_source_at_once() -> None:
    config = load(
        FUNCTION,
        {"type": "model", "path": "models/judge", "normalize": True},
        {**REMOTE, "urls": ["https://a.example/x", "http://10.0.0.1:80"], "headers": {"X": "env:Y"}},
        {"type": "math", "name": "math", "correct": 2.0, "wrong": -1.0},
        {"type": "reasoning_gym", "dataset": "chain_sum", "answer": "last_line"},
        {"type": "environment", "weight": 0.5},
        overlong={"buffer_tokens": 16},
    )
    assert config.source_names == ["reward0", "reward1", "reward2", "math", "reward4", "reward5"]


@pytest.mark.parametrize(
    "source",
    [
        {**REMOTE, "urls": []},
        {**REMOTE, "urls": ["judge:8000"]},
        {**REMOTE, "urls": ["ftp://judge"]},
        {**REMOTE, "urls": ["http://"]},
        {**REMOTE, "max_batch": 0},
        {"type": "environment", "num_replicas": 2},
        {"type": "reasoning_gym", "answer": "first_line"},
        {**FUNCTION, "name": "a/b"},
        {**FUNCTION, "normalize": "yes"},
    ],
)
def test_a_bad_value_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        load(source)


def test_names_differ_those_by_place_included() -> None:
    assert problem({**FUNCTION, "name": "reward1"}, FUNCTION).path == "sources"
    load({**FUNCTION, "name": "reward0"}, FUNCTION)


def test_the_truncation_penalty_lies_within_the_clip() -> None:
    assert problem(truncation_penalty=-2.0, clip=[-1, 1]).path == "truncation_penalty"
    load(truncation_penalty=-1.0, clip=[-1, 1])


@pytest.mark.parametrize("source", [REMOTE, {"type": "math"}, {"type": "reasoning_gym"}])
def test_a_request_ends_before_its_sample_is_given_up(source: dict[str, Any]) -> None:
    found = problem(FUNCTION, {**source, "timeout_seconds": 60}, timeout_seconds=60)
    assert found.path == "sources.1.timeout_seconds" and "reward.timeout_seconds=60" in found.got
    load(FUNCTION, {**source, "timeout_seconds": 59}, timeout_seconds=60)


def test_math_needs_a_label() -> None:
    labelled = make_config(reward={"sources": [{"type": "math"}]}, data={"label_key": "answer"})
    assert check_reward_needs(labelled) is None
    found = check_reward_needs(
        labelled.model_copy(update={"data": labelled.data.model_copy(update={"label_key": None})})
    )
    assert found is not None and found.path == "data.label_key"
    assert check_reward_needs(make_config()) is None


def tried(source: dict[str, Any], *rows: dict[str, Any]) -> None:
    """What the driver does with the rows of the data, once it has them."""
    store: Any = [make_prompt(row_id=i, **row) for i, row in enumerate(rows)]
    config = make_config(reward={"sources": [source]}, data={"label_key": "gold"})
    try_rewards({}, config.reward, "gold", store, "", lambda text: None)


def test_the_driver_reads_labels() -> None:
    tried({"type": "math"}, {"gold": "7"}, {"gold": r"\frac{1}{2}"})
    with pytest.raises(
        RewardError, match=r"^reward\.sources\.0 \(math\): row 1, column 'gold': '' is not an answer"
    ):
        tried({"type": "math"}, {"gold": "7"}, {"gold": ""})


def test_the_driver_tries_rows_of_reasoning_gym() -> None:
    with pytest.raises(
        RewardError, match=r"reward\.sources\.0 \(reasoning_gym\): row 0 has no column 'answer'"
    ):
        tried({"type": "reasoning_gym"}, {"gold": "7"})


def test_the_driver_asks_whether_a_server_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        tried({**REMOTE, "urls": [url]}, {})
    with pytest.raises(RewardError, match=rf"^reward\.sources\.0 \(remote\): urls: cannot connect to {url}"):
        tried({**REMOTE, "urls": [url]}, {})


def test_what_can_be_known_before_any_data_is_read(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say"}\n')
    sections: dict[str, Any] = {
        "model": {"path": str(tmp_path)},
        "data": {"train": str(tmp_path / "prompts.jsonl")},
        "run": {"dir": str(tmp_path)},
    }
    gym = {"type": "reasoning_gym", "dataset": "chain_sums"}
    with pytest.raises(RewardError, match=r"^reward\.sources\.0 \(reasoning_gym\): dataset: .* chain_sum"):
        check_before_ray(make_config(reward={"sources": [gym]}, **sections))
    remote = {**REMOTE, "headers": {"Authorization": "env:NO_SUCH_VARIABLE"}}
    with pytest.raises(
        RewardError, match=r"^reward\.sources\.0 \(remote\): headers\.Authorization=env:NO_SUCH"
    ):
        check_before_ray(make_config(reward={"sources": [remote]}, **sections))
