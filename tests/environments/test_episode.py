"""Episodes of a scripted policy with correct and faulty environments."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.rollout import EnvironmentConfig
from rayrlhf.environments.chat_tokens import Turns
from rayrlhf.environments.episode import Episode, play
from rayrlhf.environments.user_environment import UserEnvironment
from rayrlhf.rollout.engine import Generation
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

PARAMS = {"max_tokens": 20, "min_tokens": 0, "seed": 7, "stop": None, "temperature": 1.0}
DATA = PromptDataConfig.model_validate({"train": ["prompts.jsonl"], "max_prompt_tokens": 40})
TOKENIZER = make_tokenizer(CHAT_TEMPLATE)
TURNS = Turns(TOKENIZER, DATA)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


class Policy:
    """Returns the given answers, truncated at max_tokens as by an engine, with new weights for every turn."""

    def __init__(self, *answers: str, closed: bool = True) -> None:
        self.answers = list(answers)
        self.end = "</s>" if closed else ""
        self.requests: list[tuple[list[int], dict[str, Any]]] = []

    async def __call__(self, prompt_ids: list[int], params: dict[str, Any]) -> Generation:
        answer = self.answers[len(self.requests)]
        self.requests.append((prompt_ids, params))
        ids = ids_of(answer + self.end)
        kept = ids[: params["max_tokens"]]
        return Generation(
            token_ids=kept,
            text=answer[: len(kept)],
            logprobs=[-float(len(self.requests))] * len(kept),
            truncated=len(kept) < len(ids),
            policy_versions=[2 + len(self.requests)] * len(kept),
        )


class Echo:
    """Returns the response in upper case and is done at `last`; each step gives 0.25."""

    def __init__(self, last: str = "bye") -> None:
        self.last = last
        self.closed = 0

    def reset(self, row: dict[str, Any]) -> Any:
        return row["question"]

    def step(self, response: str) -> Any:
        return response.upper(), 0.25, response == self.last

    def close(self) -> None:
        self.closed += 1


def played(
    policy: Any,
    environment: Any = Echo,
    *,
    row: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    turns: Turns = TURNS,
    **config: Any,
) -> Episode:
    settings = EnvironmentConfig.model_validate({"environment": "m:E", **config})
    user = UserEnvironment(environment, settings.arguments)
    return asyncio.run(
        play(user, turns, settings, row or {"question": "Hi"}, {**PARAMS, **(params or {})}, policy)
    )


def test_tokens_are_kept_as_generated() -> None:
    policy = Policy("ab", "bye")
    episode = played(policy)
    opening, first, observation, last = (
        "<s><|user|>Hi</s><|assistant|>",
        "ab</s>",
        "<|user|>AB</s><|assistant|>",
        "bye</s>",
    )
    assert (episode.prompt, episode.prompt_ids) == (opening, ids_of(opening))
    assert episode.response_ids == ids_of(first + observation + last)
    assert episode.response == "ab</s><|user|>AB</s><|assistant|>bye"
    # 2 letters and the end; role, 2 letters, end, role; 3 letters and the end.
    assert episode.loss_mask == [1] * 3 + [0] * 5 + [1] * 4
    assert episode.logprobs == [-1.0] * 3 + [0.0] * 5 + [-2.0] * 4
    assert episode.policy_versions == [3] * 3 + [4] * 9, "the second weights have read the observation"
    assert (episode.reward, episode.failure) == (0.5, "")
    assert (episode.truncated, episode.num_turns) == (False, 2)
    assert [prompt_ids for prompt_ids, _ in policy.requests] == [
        ids_of(opening),
        ids_of(opening + first + observation),
    ]


def test_an_answer_that_ends_with_a_stop_string_gets_the_end_of_turn() -> None:
    episode = played(Policy("ab", "bye", closed=False))
    assert episode.response_ids == ids_of("ab" + "</s><|user|>AB</s><|assistant|>" + "bye")
    assert episode.loss_mask == [1] * 2 + [0] * 6 + [1] * 3


def test_every_turn_has_a_distinct_seed_and_stops_at_the_end_of_its_turn() -> None:
    first, again, other = Policy("a", "b", "bye"), Policy("a", "b", "bye"), Policy("a", "b", "bye")
    played(first)
    played(again)
    played(other, params={"seed": 8})
    seeds = [[params["seed"] for _, params in policy.requests] for policy in (first, again, other)]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6
    assert all(params["stop_token_ids"] == [TOKENIZER.eos_token_id] for _, params in first.requests)
    assert all(params["include_stop_str_in_output"] for _, params in first.requests)


def test_the_last_turn_ends_the_episode() -> None:
    episode = played(Policy("a", "b", "c"), max_turns=2)
    assert (episode.num_turns, episode.truncated, episode.reward) == (2, False, 0.5)
    assert episode.response_ids[-2:] == ids_of("b</s>"), "no observation without a response"


def test_a_response_that_is_cut_off_ends_the_episode_unseen() -> None:
    episode = played(Policy("a", "far too long"), params={"max_tokens": 5})
    assert (episode.num_turns, episode.truncated, episode.failure) == (2, True, "")
    assert episode.reward == 0.25, "earlier rewards count"
    assert episode.response_ids[-5:] == ids_of("far t")


@pytest.mark.parametrize("budget", range(2, 16))
def test_all_turns_share_one_budget(budget: int) -> None:
    # "ab</s>" is 3 tokens, its observation 5, "bye</s>" 4: 12 in all, and no use in a second turn of none.
    policy = Policy("ab", "bye")
    episode = played(policy, max_response_tokens=budget, params={"min_tokens": 3})
    assert len(episode.response_ids) == {2: 2, **dict.fromkeys(range(3, 9), 3)}.get(budget, min(budget, 12))
    assert episode.truncated == (budget < 12)
    assert all(params["min_tokens"] <= params["max_tokens"] for _, params in policy.requests)


def test_text_without_a_template() -> None:
    plain = PromptDataConfig.model_validate({"train": ["p.jsonl"], "apply_chat_template": False})
    episode = played(Policy("ab;", "bye", closed=False), turns=Turns(TOKENIZER, plain))
    assert episode.prompt == "<s>Hi"
    assert episode.response_ids == ids_of("ab;" + "AB;" + "bye")
    assert episode.loss_mask == [1] * 3 + [0] * 3 + [1] * 3


class AsyncEcho(Echo):
    async def reset(self, row: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return super().reset(row)

    async def step(self, response: str) -> Any:
        await asyncio.sleep(0)
        return super().step(response)


def test_methods_may_be_async() -> None:
    assert played(Policy("ab", "bye"), AsyncEcho) == played(Policy("ab", "bye"))


def test_plain_methods_share_a_thread_outside_the_loop() -> None:
    threads: list[Any] = []

    class Watch(Echo):
        def __init__(self) -> None:
            threads.append(threading.current_thread())
            super().__init__()

        def step(self, response: str) -> Any:
            threads.append(threading.current_thread())
            return super().step(response)

        def close(self) -> None:
            threads.append(threading.current_thread())

    played(Policy("a", "bye"), Watch)
    assert len(threads) == 4 and len(set(threads)) == 1, "sqlite, for example, requires this"
    assert threads[0] is not threading.main_thread()
    threads[0].join(timeout=5)
    assert not threads[0].is_alive()


def environment(**methods: Any) -> type[Echo]:
    return type("Environment", (Echo,), methods)


def fails(*_: Any) -> Any:
    raise KeyError("answer")


async def fails_later(*_: Any) -> Any:
    raise KeyError("answer")


def runs_dry(*_: Any) -> Any:
    return next(iter([]))


def leaves(*_: Any) -> Any:
    raise SystemExit("enough")


def returns(value: Any) -> Any:
    return lambda *_: value


@pytest.mark.parametrize(
    "methods, failure",
    [
        ({"step": fails}, r"step\(\) raised KeyError: 'answer' \(test_episode.py:\d+\)"),
        ({"step": fails_later}, r"step\(\) raised KeyError: 'answer' \(test_episode.py:\d+\)"),
        ({"reset": fails}, r"reset\(\) raised KeyError"),
        ({"__init__": fails}, r"__init__\(\) raised KeyError"),
        ({"step": runs_dry}, r"step\(\) raised StopIteration"),
        ({"step": leaves}, r"step\(\) raised SystemExit: enough"),
        ({"step": lambda self: None}, r"step\(\) raised TypeError: .* takes 1 positional argument"),
        ({"reset": returns([])}, r"reset\(\): .* is an empty list"),
        ({"reset": returns("x" * 50)}, r"reset\(\): the opening has 54 tokens; .*max_prompt_tokens is 40"),
        ({"step": returns(None)}, r"step\(\) returned None; \(observation, reward, done\) was wanted"),
        ({"step": returns(("a", 1.0))}, r"step\(\) returned \('a', 1.0\); "),
        ({"step": returns(("a", None, False))}, r"the reward None; a finite number was wanted"),
        ({"step": returns(("a", float("nan"), False))}, r"the reward nan; a finite number"),
        ({"step": returns(("a", float("inf"), True))}, r"the reward inf; a finite number"),
        ({"step": returns(("a", True, 0.5))}, r"done=0.5; True or False was wanted"),
        ({"step": returns((84, 0.0, False))}, r"step\(\): an observation of type int; wanted a text"),
    ],
)
def test_errors_of_the_environment_are_reported(methods: dict[str, Any], failure: str) -> None:
    episode = played(Policy("ab", "bye"), environment(**methods))
    assert episode.reward is None
    assert re.search(failure, episode.failure), episode.failure
    in_step = "step" in methods
    assert episode.response_ids == (ids_of("ab</s>") if in_step else []), "the tokens so far are kept"
    assert len(episode.loss_mask) == len(episode.logprobs) == len(episode.policy_versions)


def test_an_observation_is_ignored_when_done() -> None:
    assert played(Policy("ab"), environment(step=returns((None, 1, True)))).reward == 1.0


def test_a_step_that_never_returns_is_abandoned() -> None:
    never = threading.Event()
    created: list[UserEnvironment] = []

    async def one(kind: Any, policy: Policy) -> Episode:
        settings = EnvironmentConfig(environment="m:E", timeout_seconds=0.2)
        created.append(UserEnvironment(kind, {}))
        return await play(created[-1], TURNS, settings, {"question": "Hi"}, PARAMS, policy)

    async def both() -> tuple[Episode, Episode]:
        stuck = environment(step=lambda *_: never.wait())
        return await asyncio.gather(one(stuck, Policy("ab")), one(Echo, Policy("ab", "bye")))

    started = time.monotonic()
    stuck, fine = asyncio.run(both())
    assert time.monotonic() - started < 5
    assert stuck.failure == "timed out after 0.2 s in step() (rollout.environment.timeout_seconds)"
    assert (stuck.reward, stuck.response_ids) == (None, ids_of("ab</s>"))
    assert fine.reward == 0.5
    thread, none = created[0].stuck_thread, created[1].stuck_thread
    assert thread is not None and thread.is_alive() and none is None
    never.set()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_coroutine_that_ignores_cancellation_is_abandoned() -> None:
    async def stubborn(*_: Any) -> None:
        while True:
            try:
                await asyncio.sleep(0.5)
                return
            except asyncio.CancelledError:
                continue

    episode = played(Policy("ab"), environment(step=stubborn), timeout_seconds=0.1)
    assert episode.failure.startswith("timed out after 0.1 s in step()")


def test_waiting_for_the_engine_counts_too() -> None:
    async def never(prompt_ids: Sequence[int], params: Any) -> Generation:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    assert played(never, timeout_seconds=0.1).failure.startswith("timed out after 0.1 s in generation")


def test_an_error_of_the_engine_is_not_an_environment_failure() -> None:
    async def dies(prompt_ids: Sequence[int], params: Any) -> Generation:
        raise TimeoutError("no engine answered")

    with pytest.raises(TimeoutError, match="no engine answered"):
        played(dies)


@pytest.mark.parametrize("step", [Echo.step, fails], ids=["to the end", "after a failure"])
def test_the_environment_is_closed(step: Any) -> None:
    created: list[Echo] = []

    def make() -> Echo:
        created.append(environment(step=step)())
        return created[0]

    played(Policy("bye"), make)
    assert created[0].closed == 1


def test_a_failing_close_costs_no_reward() -> None:
    assert played(Policy("bye"), environment(close=fails)).reward == 0.25
