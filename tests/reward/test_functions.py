"""Reward functions of the user's: found, tried, and held to the contract."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.reward_sources import FunctionLimits
from rayrlhf.isolation.output import OutputLog
from rayrlhf.reward import functions
from rayrlhf.reward.function_host import call_function, narrow
from rayrlhf.reward.functions import FunctionReward, arguments_for, hosted_function, try_function
from rayrlhf.reward.items import Failure, RewardError, ScoreItem
from rayrlhf.usercode import UserCode, find_user_code
from tests.samples import make_prompt

LIMITS = FunctionLimits()

SOURCE = """
import math
from dataclasses import dataclass

BONUS = 0.5

@dataclass
class Weights:
    length: float = 1.0

def length(responses):
    return [float(len(r)) * Weights().length for r in responses]

def letters(prompts, responses):
    return [float(sum(map(str.isalpha, r))) for r in responses]

async def slowly(responses):
    return [BONUS for _ in responses]

def _private(responses):
    return [0.0 for _ in responses]
"""
PROMPTS = [make_prompt(prompt="a", answer="1", topic="x"), make_prompt(prompt="b", answer="2")]


def find_function(text: str) -> UserCode:
    return functions.find_function(text, LIMITS, 60)


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`reward_module(source)` makes an importable module and gives its name."""
    folder = tmp_path / "importable"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(source: str) -> str:
        name = f"rewards_of_{abs(hash((source, str(tmp_path))))}"
        (folder / f"{name}.py").write_text(source)
        return name

    return write


def test_a_function_of_a_module(reward_module: Callable[[str], str]) -> None:
    spec = find_function(f"{reward_module(SOURCE)}:length")
    assert spec.file_source is None, "every node imports it by itself"
    assert spec.load()(["abc", ""]) == [3.0, 0.0]


def test_a_function_of_a_file_travels_as_text(reward_file: Path) -> None:
    spec = find_function(f"{reward_file}:length")
    assert (spec.place, spec.name) == (str(reward_file), "length")
    reward_file.unlink()  # as on another node
    assert spec.load()(["abc", ""]) == [3.0, 0.0]


@pytest.mark.parametrize("where", ["file", "module"])
def test_a_missing_function_is_reported_with_those_that_exist(
    where: str, reward_file: Path, reward_module: Callable[[str], str]
) -> None:
    place = str(reward_file) if where == "file" else reward_module(SOURCE)
    with pytest.raises(RewardError) as caught:
        find_function(f"{place}:lenght")
    # The dataclass decorator is imported, but no reward function; neither is what starts with an underscore.
    assert str(caught.value) == f"{place} has no function 'lenght'; it has: length, letters, slowly"
    with pytest.raises(RewardError, match="no function 'BONUS'"):
        find_function(f"{place}:BONUS")


@pytest.mark.parametrize("where", ["file", "module"])
@pytest.mark.parametrize(
    "source, message",
    [
        ("raise KeyError('no such table')", r"fails at import: KeyError: 'no such table'"),
        ("def broken(:", r"fails at import: SyntaxError: "),
    ],
)
def test_code_that_fails_at_import(
    where: str, source: str, message: str, reward_file: Path, reward_module: Callable[[str], str]
) -> None:
    reward_file.write_text(source)
    place = str(reward_file) if where == "file" else reward_module(source)
    with pytest.raises(RewardError, match=message) as caught:
        find_function(f"{place}:score")
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    "text, message",
    [
        ("no_such_package_here.rewards:f", "cannot import 'no_such_package_here.rewards' .* on PYTHONPATH"),
        ("no/such/file.py:f", "no/such/file.py is not a file .looked from /"),
        ("just_a_name", "'just_a_name' is not of the form module:function or path/file.py:function"),
        ("module:", "is not of the form"),
    ],
)
def test_what_cannot_be_found(text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        find_function(text)


def test_arguments_are_narrowed_to_the_signature() -> None:
    def asks_for_three(responses: list[str], labels: list[str], topic: list[str]) -> None: ...

    def asks_for_all(**everything: Any) -> None: ...

    responses = ["r0", "r1"]
    arguments = arguments_for(PROMPTS, responses, "answer")
    narrowed = narrow(asks_for_three, arguments)
    # A column that a row does not have is None there, so that all lists have one length.
    assert narrowed == {"responses": responses, "labels": ["1", "2"], "topic": ["x", None]}
    assert narrow(asks_for_all, arguments) == {
        "prompts": ["a", "b"],
        "responses": responses,
        "labels": ["1", "2"],
        "answer": ["1", "2"],
        "topic": ["x", None],
    }


def test_without_a_label_column_labels_are_none() -> None:
    def asks(labels: list[Any]) -> None: ...

    assert narrow(asks, arguments_for(PROMPTS, ["r0", "r1"], None)) == {"labels": [None, None]}


def test_a_column_cannot_shadow_the_responses() -> None:
    def asks(prompts: list[str], responses: list[str]) -> None: ...

    prompts = [make_prompt(prompt="rendered", prompts="raw", responses="reference")]
    arguments = arguments_for(prompts, ["mine"], None)
    assert narrow(asks, arguments) == {"prompts": ["rendered"], "responses": ["mine"]}


def call(returned: Any, count: int = 2) -> list[float | None]:
    return asyncio.run(call_function(lambda: returned, {}, count))


@pytest.mark.parametrize(
    "returned, rewards",
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, False), [1.0, 0.0]),
        (np.array([1.5, -2.0], dtype=np.float32), [1.5, -2.0]),
        ([None, math.nan], [None, None]),
        ([math.nan, 3.0], [None, 3.0]),
    ],
)
def test_what_counts_as_rewards(returned: Any, rewards: list[float | None]) -> None:
    found = call(returned)
    assert found == rewards and all(reward is None or type(reward) is float for reward in found)


@pytest.mark.parametrize("returned", [0.5, None, ["good", "bad"], [[1.0], [2.0]], [{"score": 1}, 2.0]])
def test_what_is_no_list_of_floats_is_reported(returned: Any) -> None:
    with pytest.raises(RewardError, match="wanted a list of 2 floats") as caught:
        call(returned)
    assert str(caught.value).startswith(f"returned {returned!r}")


@pytest.mark.parametrize("returned", [[], [1.0], [1.0, 2.0, 3.0]])
def test_one_reward_per_response(returned: list[float]) -> None:
    with pytest.raises(RewardError, match=f"returned {len(returned)} rewards for 2 responses"):
        call(returned)


def test_functions_may_be_async(reward_file: Path) -> None:
    function = find_function(f"{reward_file}:slowly").load()
    assert asyncio.run(call_function(function, {"responses": ["a", "b"]}, 2)) == [0.5, 0.5]


def test_a_slow_plain_function_does_not_hold_up_the_replica() -> None:
    """It runs on a thread: two calls that wait for each other can only finish side by side."""
    import threading

    barrier = threading.Barrier(2, timeout=10)

    def meets() -> list[float]:
        barrier.wait()
        return [1.0]

    async def both() -> list[list[float | None]]:
        return list(await asyncio.gather(call_function(meets, {}, 1), call_function(meets, {}, 1)))

    assert asyncio.run(both()) == [[1.0], [1.0]]


def tried(source: str, tmp_path: Path) -> None:
    path = tmp_path / "tried.py"
    path.write_text(source)
    hosted = hosted_function(find_function(f"{path}:score"), LIMITS, 60)
    try_function(hosted, OutputLog("reward0"), PROMPTS, "answer")


def test_a_trial_sees_what_training_will_show(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    tried(
        f"""
import json
def score(prompts, responses, labels, answer, topic):
    json.dump([prompts, labels, answer, topic, len(responses), all(responses)], open({str(seen)!r}, "w"))
    return [0.0, None]  # one failure is no reason to stop
""",
        tmp_path,
    )
    assert json.loads(seen.read_text()) == [["a", "b"], ["1", "2"], ["1", "2"], ["x", None], 2, True]


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "(responses): return [1 / 0]",
            r"score raised ZeroDivisionError: division by zero \(tried.py:1\) when called with responses$",
        ),
        (
            "(responses, anwser): return [0, 0]",
            r"score raised TypeError: .* argument: 'anwser' when called with responses$",
        ),
        ("(responses): return [1.0]", r"score returned 1 rewards for 2 responses"),
        ("(responses): return 1.0", r"score returned 1\.0; wanted a list of 2 floats"),
        ("(responses): return [None, float('nan')]", r"score returned only NaN or None"),
    ],
)
def test_a_trial_reports_what_is_wrong(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        tried(f"def score{body}", tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tried.py"))


def test_a_replica_scores(reward_file: Path) -> None:
    items = [
        ScoreItem(prompt, response, [1]) for prompt, response in zip(PROMPTS, ["ab1", "--"], strict=True)
    ]

    async def scored() -> list[float | Failure | None]:
        replica = await make_replica(find_user_code(f"{reward_file}:letters", "function"))
        try:
            return await replica.score(items)
        finally:
            await replica.pool.kill()

    assert asyncio.run(scored()) == [2.0, 0.0]


async def make_replica(code: UserCode) -> FunctionReward:
    """As Serve makes it."""
    replica = FunctionReward.__new__(FunctionReward)
    await replica.__init__(hosted_function(code, LIMITS, 60), "answer", "reward0")
    return replica


# 23: what a reward function may do to its process, on the driver


@pytest.mark.parametrize(
    "source, message",
    [
        ("exit()", r"tried.py fails at import: SystemExit: None .tried.py:1.$"),
        ("raise KeyboardInterrupt", r"tried.py fails at import: KeyboardInterrupt"),
        ("import os; os._exit(0)", r"score: it ended its own process with exit code 0$"),
        ("import os; os.abort()", r"score: its process was killed by SIGABRT$"),
        (
            "import time; time.sleep(1000)",
            r"score: its import took longer than 2 s \(start_timeout_seconds\)$",
        ),
    ],
)
def test_an_import_on_the_driver_does_it_no_harm(source: str, message: str, tmp_path: Path) -> None:
    """`exit()` ended the run with code 0 and without a word; a loop that never ends hung it for ever."""
    path = tmp_path / "tried.py"
    path.write_text(source)
    seconds = 2 if "sleep" in source else 60
    with pytest.raises(RewardError, match=message) as caught:
        functions.find_function(f"{path}:score", FunctionLimits(start_timeout_seconds=seconds), 60)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body, message",
    [
        ("exit()", r"score raised SystemExit: None \(tried.py:2\) when called with responses$"),
        ("raise KeyboardInterrupt", r"score raised KeyboardInterrupt:  \(tried.py:2\)"),
        ("import os; os._exit(3)", r"score: it ended its own process with exit code 3"),
        ("import time; time.sleep(1000)", r"score took longer than 2 s \(timeout_seconds\)$"),
        ("return [object()] * 2", r"returned \[<object .* wanted a list of 2 floats"),
        ("return [0.0] * 10**7", r"returned 10000000 rewards for 2 responses"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_trial_does_the_driver_no_harm(kind: str, body: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tried.py"
    path.write_text(f"{kind} score(responses):\n    {body}")
    limits = FunctionLimits(timeout_seconds=2 if "sleep" in body else None)
    hosted = hosted_function(find_user_code(f"{path}:score", "function"), limits, 60)
    with pytest.raises(RewardError, match=message) as caught:
        try_function(hosted, OutputLog("reward0"), PROMPTS, "answer")
    assert "\n" not in str(caught.value)


def test_the_deadline_of_a_call_leaves_time_to_wait_in_line() -> None:
    code = UserCode("rewards:length", "function")
    assert hosted_function(code, FunctionLimits(), 50).timeout_seconds == 40
    assert hosted_function(code, FunctionLimits(timeout_seconds=7), 50).timeout_seconds == 7


def test_in_a_replica_a_call_that_ends_the_process_costs_itself(tmp_path: Path) -> None:
    """And is not asked again, which would cost another process."""
    path = tmp_path / "fatal.py"
    path.write_text(
        "import os, time\n"
        "def score(responses):\n"
        "    if responses == ['die']:\n"
        "        time.sleep(0.2)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.5)\n"
        "    return [1.0]\n"
    )

    async def main() -> list[Any]:
        replica = await make_replica(find_user_code(f"{path}:score", "function"))
        try:
            return list(await replica.score([ScoreItem(PROMPTS[0], r, [1]) for r in ("a", "die", "b")]))
        finally:
            await replica.pool.kill()

    died = Failure(f"{path}:score: it ended its own process with exit code 0", final=True)
    assert asyncio.run(main()) == [1.0, died, 1.0]


def test_in_a_replica_a_sample_that_fails_costs_its_group_nothing(tmp_path: Path) -> None:
    """Nor do slow ones wait for each other."""
    path = tmp_path / "picky.py"
    path.write_text(
        "import time\n"
        "def score(responses):\n"
        "    [response] = responses\n"
        "    time.sleep(0.5)\n"
        "    return [1 / len(response)]\n"
    )

    async def main() -> tuple[list[Any], float]:
        replica = await make_replica(find_user_code(f"{path}:score", "function"))
        try:
            started = time.monotonic()
            found = await replica.score([ScoreItem(PROMPTS[0], r, [1]) for r in ("ab", "", *"abcdef")])
            return list(found), time.monotonic() - started
        finally:
            await replica.pool.kill()

    [first, failed, *rest], seconds = asyncio.run(main())
    assert (first, rest) == (0.5, [1.0] * 6)
    assert isinstance(failed, Failure) and "raised ZeroDivisionError" in failed.reason and not failed.final
    assert seconds < 3.0, "one after the other they take 4 s"


def test_a_request_to_a_reward_server_is_one_call(tmp_path: Path) -> None:
    path = tmp_path / "counting.py"
    path.write_text("def score(responses):\n    return [len(responses) / len(r) for r in responses]\n")

    async def main() -> list[float | None]:
        replica = await make_replica(find_user_code(f"{path}:score", "function"))
        try:
            rewards = await replica.score_together([ScoreItem(PROMPTS[0], r, [1]) for r in ("a", "ab")])
            with pytest.raises(RewardError, match="ZeroDivisionError"):
                await replica.score_together([ScoreItem(PROMPTS[0], r, [1]) for r in ("a", "")])
            return rewards
        finally:
            await replica.pool.kill()

    assert asyncio.run(main()) == [2.0, 1.0]


@pytest.mark.parametrize("value", ["float('inf')", "-float('inf')", "1e30", "1e19"])
def test_a_reward_beyond_the_bound_is_refused_at_the_trial(value: str, tmp_path: Path) -> None:
    """In the run each such sample fails (`test_score`); the trial took it."""
    path = tmp_path / "big.py"
    path.write_text(f"def score(responses):\n    return [1.0, {value}]\n")
    hosted = hosted_function(find_user_code(f"{path}:score", "function"), LIMITS, 60)
    with pytest.raises(RewardError, match=r"returned .*, which is .*; wanted numbers up to ±1e\+18"):
        try_function(hosted, OutputLog("reward0"), PROMPTS, None)


def test_the_largest_reward_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "big.py"
    path.write_text("def score(responses):\n    return [1e18, None]\n")
    hosted = hosted_function(find_user_code(f"{path}:score", "function"), LIMITS, 60)
    try_function(hosted, OutputLog("reward0"), PROMPTS, None)
