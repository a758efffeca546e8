"""Graders: answers of mathematics and of reasoning-gym, and processes that survive what they are given."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rayrlhf.config.reward import MathSource, ReasoningGymSource, RewardConfig
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.reward.client import RewardClient, RewardSource
from rayrlhf.reward.graders import UnusableRow, gold_text, import_reasoning_gym, load_math, load_reasoning_gym
from rayrlhf.reward.items import Failure, RewardError, ScoreItem, Unverified
from rayrlhf.reward.verifiable import (
    VerifiableReward,
    check_installed,
    grade,
    grader_pool,
    grading_request,
    read_answer,
    start_graders,
    try_rows,
)
from rayrlhf.samples import Sample
from tests.samples import make_prompt, make_sample

MATH = MathSource(type="math")
GYM = ReasoningGymSource(type="reasoning_gym")


@pytest.mark.parametrize(
    ("label", "response", "grade"),
    [
        ("72", "So she sold 72.", 1.0),
        (72, r"\boxed{72}", 1.0),
        (0.5, r"the answer is $\frac{1}{2}$", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"\frac{1}{2}", "2", 0.0),  # read without delimiters, the label would be its last number
        (r"$x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("(1,2)", "$(1,2)$", 1.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
        ("She has 3 + 4 = 7 apples.\n#### 7", "3 + 4 = 7", 1.0),
        ("1,234", "1234", 1.0),
        ("5", "I do not know", 0.0),
        ("5", "", 0.0),
        ("5", "The answer is 6.", 0.0),
        ("5", r"$\frac{", 0.0),
        ("5", "7 " * 50_000 + "so the answer is 5", 1.0),
    ],
)
def test_answers_of_mathematics(label: Any, response: str, grade: float) -> None:
    assert load_math()({"label": label, "response": response}) == grade


@pytest.mark.parametrize("label", ["", "  ", r"\frac{", None, True, ["5"], {"value": 5}, "####"])
def test_a_label_that_is_no_answer_is_no_wrong_response(label: Any) -> None:
    for response in ("5", None):
        with pytest.raises(UnusableRow, match="is not an answer"):
            load_math()({"label": label, "response": response})


def test_a_label_is_delimited_once() -> None:
    assert gold_text(r"\frac12") == r"\boxed{\frac12}"
    assert gold_text(r"\boxed{7}") == r"\boxed{7}" and gold_text("$7$") == "$7$"


@pytest.mark.parametrize(
    ("response", "tag", "last_line", "whole"),
    [
        ("<answer> 7\n</answer>", "7", "</answer>", "<answer> 7\n</answer>"),
        ("<answer>6</answer> no <answer>7</answer> <answer>", "7", None, None),
        ("thinking\n\n 7 \n\n", None, "7", "thinking\n\n 7"),
        ("</answer>7<answer>", None, "</answer>7<answer>", "</answer>7<answer>"),
        ("", None, None, ""),
    ],
)
def test_where_the_answer_stands(
    response: str, tag: str | None, last_line: str | None, whole: str | None
) -> None:
    assert read_answer(response, "tag") == tag
    if last_line is not None or response == "":
        assert read_answer(response, "last_line") == last_line
        assert read_answer(response, "whole") == whole


def entries(name: str, count: int = 2) -> list[dict[str, Any]]:
    """Rows of a data set as they come back from a file: through JSON."""
    made = import_reasoning_gym().create_dataset(name, size=count, seed=1)
    return [json.loads(json.dumps(made[i])) for i in range(count)]


grade_gym = functools.cache(load_reasoning_gym)  # it keeps the scorers, some of which load data


def gym_grade(entry: dict[str, Any], response: str | None, **source: Any) -> float:
    config = ReasoningGymSource(type="reasoning_gym", **source)
    return grade_gym()(grading_request(config, make_prompt(**entry), response, None))


# Plain texts, numbers, a puzzle with a scorer of its own, and one whose grids JSON changes.
@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "countdown", "spell_backward", "arc_agi"])
def test_right_and_wrong_answers_of_reasoning_gym(name: str) -> None:
    for entry in entries(name):
        assert gym_grade(entry, f"Let me think. <answer>{entry['answer']}</answer>") == 1.0
        assert gym_grade(entry, entry["answer"]) < 0.1, "without its tag, it is not an answer"
        assert gym_grade(entry, entry["answer"], answer="whole") == 1.0
        assert gym_grade(entry, "<answer>no idea</answer>") < 0.5  # some give a little for trying
        assert gym_grade(entry, None) == 1.0


def test_a_row_with_many_right_answers() -> None:
    [entry] = entries("graph_color", 1)
    assert entry["answer"] is None and gym_grade(entry, None) == 0.0
    one = json.dumps(entry["metadata"]["possible_answer"])
    assert gym_grade(entry, one, answer="last_line") == 1.0


def test_an_answer_that_a_scorer_cannot_read_is_wrong() -> None:
    [entry] = entries("prime_factorization", 1)  # its scorer raises ValueError at words
    assert gym_grade(entry, "<answer>I do not know</answer>") == 0.0


def test_metadata_may_be_a_json_text() -> None:
    [entry] = entries("chain_sum", 1)
    entry["metadata"] = json.dumps(entry["metadata"])
    assert gym_grade(entry, f"<answer>{entry['answer']}</answer>") == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"source_dataset": "arc_agi", "output": [[1]]}, "answer": "2"}, "answer gets 0.05"),
        (
            {"metadata": {"source_dataset": "prime_factorization"}, "answer": 3},
            "cannot use the row's columns",
        ),
        ({"metadata": {"source_dataset": "no_such"}}, "has no data set 'no_such'"),
    ],
)
def test_a_row_that_its_scorer_cannot_use(change: dict[str, Any], message: str) -> None:
    [entry] = entries("chain_sum", 1)
    with pytest.raises(UnusableRow, match=message):
        gym_grade({**entry, **change}, None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"metadata": {}}, "row 4 has no column 'answer'"),
        ({"answer": "1"}, "row 4 has no column 'metadata'"),
        ({"answer": "1", "metadata": "{"}, "row 4: column 'metadata' is '{'; wanted an object"),
        ({"answer": "1", "metadata": {}}, "row 4: column 'metadata' has no source_dataset"),
    ],
)
def test_a_row_without_what_reasoning_gym_needs(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError) as caught:
        grading_request(GYM, make_prompt(row_id=4, **columns), "7", None)
    assert str(caught.value).startswith(message)


def test_a_row_without_a_label() -> None:
    with pytest.raises(RewardError, match=r"row 4 has no column 'gold' \(data\.label_key\)"):
        grading_request(MATH, make_prompt(row_id=4), "7", "gold")


def test_names_of_data_sets_are_checked() -> None:
    check_installed(MATH)
    check_installed(ReasoningGymSource(type="reasoning_gym", dataset="chain_sum"))
    with pytest.raises(
        RewardError, match=r"dataset: reasoning-gym has no 'chain_sums'; did you mean chain_sum"
    ):
        check_installed(ReasoningGymSource(type="reasoning_gym", dataset="chain_sums"))
    with pytest.raises(RewardError, match="it has ab, acre, "):
        check_installed(ReasoningGymSource(type="reasoning_gym", dataset="0123456789"))


def test_labels_are_read_before_the_run() -> None:
    good = [make_prompt(row_id=i, gold=str(i)) for i in range(3)]
    try_rows(MATH, good, "gold")
    with pytest.raises(RewardError, match=r"^row 3, column 'gold': '.*frac\{' is not an answer"):
        try_rows(MATH, [*good, make_prompt(row_id=3, gold=r"\frac{")], "gold")


@asynccontextmanager
async def graders(kind: str = "math", **options: Any) -> AsyncIterator[ProcessPool]:
    pool = grader_pool(kind, **({"num_processes": 1, "timeout_seconds": 2} | options))
    try:
        await start_graders(pool)
        yield pool
    finally:
        await pool.kill()


TOWER = "$9^{9^{9^{9}}}$"  # no computer has the time, nor the memory
GOOD = {"label": "5", "response": "5"}


def test_a_pathological_expression_costs_its_deadline_and_no_more() -> None:
    async def main() -> None:
        async with graders() as pool:
            assert await grade(pool, {"label": "5", "response": TOWER}) == Unverified(
                0.0, "grading took longer than 2 s (timeout_seconds)"
            )
            assert await grade(pool, GOOD) == 1.0, "another process has taken its place"

    asyncio.run(main())


def test_a_failure_of_a_grader_keeps_it() -> None:
    async def main() -> None:
        async with graders() as pool:
            assert await grade(pool, {"label": None, "response": "5"}) == Failure(
                "None is not an answer; wanted a text or a number", final=True
            )
            assert await grade(pool, GOOD) == 1.0
            assert pool.num_started == 1

    asyncio.run(main())


def test_a_grader_that_died_is_replaced() -> None:
    async def main() -> None:
        async with graders() as pool:
            [loaded] = pool._processes
            await loaded.process.kill()
            assert await grade(pool, GOOD) == 1.0
            assert pool.num_started == 2

    asyncio.run(main())


def test_answers_that_take_long_to_grade_hold_up_nobody_and_are_not_graded_again() -> None:
    """23a: 2 power towers among 16 answers, one process, and a caller that asks again whatever fails.

    That good answers do not wait for them: `test_slow_calls_hold_up_nobody` in tests/isolation.
    """
    responses = [TOWER if i in (1, 5) else "so it is 5" for i in range(16)]

    async def main() -> tuple[list[Sample], RewardClient, int]:
        replica = VerifiableReward.__new__(VerifiableReward)
        source = MathSource(type="math", timeout_seconds=4, wrong=-1.0)
        await replica.__init__(source, "gold")
        asked = 0

        class Handle:
            async def _score(self, items: list[ScoreItem]) -> Any:
                nonlocal asked
                asked += 1
                return await replica.score(items)

            def remote(self, items: list[ScoreItem]) -> Any:
                return self._score(items)

            @property
            def score(self) -> Any:
                return self

        reward = RewardConfig.model_validate({"sources": [{"type": "math"}], "timeout_seconds": 200})
        client = RewardClient([RewardSource("math", 1.0, Handle())], reward)

        async def one(response: str) -> Sample:
            sample = make_sample(prompt=make_prompt(gold="5"), response=response, score=None)
            [scored] = await client.score([sample])
            return scored

        try:
            return await asyncio.gather(*map(one, responses)), client, asked
        finally:
            await replica.pool.kill()

    scored, client, asked = asyncio.run(main())
    assert [s.source_rewards for s in scored] == [(-1.0,) if r == TOWER else (1.0,) for r in responses]
    assert asked == 16, "nothing is asked twice"
    assert client.drain_unverified() == 2 and client.drain_failures() == {}


def test_a_grader_that_does_not_start_says_so() -> None:
    async def main() -> None:
        async with graders("alchemy"):
            raise AssertionError

    with pytest.raises(RewardError, match="the grader of alchemy does not start: KeyError: 'alchemy'"):
        asyncio.run(main())
