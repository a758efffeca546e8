"""Verifiable answers as a reward source: math-verify and the scorers of reasoning-gym."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ray import serve

from rayrlhf.config.reward import MathSource, ReasoningGymSource
from rayrlhf.reward.grader_pool import GraderPool
from rayrlhf.reward.graders import import_reasoning_gym
from rayrlhf.reward.items import Failure, RewardError, ScoreItem
from rayrlhf.samples import Prompt

VerifiableSource = MathSource | ReasoningGymSource


def grading_request(
    source: VerifiableSource, prompt: Prompt, response: str | None, label_key: str | None
) -> dict[str, Any]:
    """What the grader is asked; without a response, whether it can use the row. Raises `RewardError`, which
    names the row and the column, for a row that lacks what the grader needs.
    """
    columns, row = prompt.columns, f"row {prompt.row_id}"
    if source.type == "math":
        assert label_key is not None  # the config insists on it
        if label_key not in columns:
            raise RewardError(f"{row} has no column {label_key!r} (data.label_key)")
        return {"label": columns[label_key], "response": response}
    for name in ("answer", "metadata"):
        if name not in columns:
            raise RewardError(
                f"{row} has no column {name!r}; wanted reasoning-gym's own columns, answer and metadata"
            )
    metadata = _metadata_of(columns["metadata"], row)
    dataset = source.dataset or metadata.get("source_dataset")
    if not dataset:
        raise RewardError(
            f"{row}: column 'metadata' has no source_dataset; set the source's dataset to the data set's name"
        )
    return {
        "dataset": dataset,
        "entry": {"question": columns.get("question"), "answer": columns["answer"], "metadata": metadata},
        "response": response,
        "answer": None if response is None else read_answer(response, source.answer),
    }


def _metadata_of(value: Any, row: str) -> dict[str, Any]:
    """The column `metadata`: an object, or one as a JSON text, which published data sets keep it as."""
    metadata = value
    if isinstance(value, str):
        try:
            metadata = json.loads(value)
        except json.JSONDecodeError:
            metadata = None
    if not isinstance(metadata, dict):
        raise RewardError(f"{row}: column 'metadata' is {value!r:.80}; wanted an object, or one as JSON text")
    return metadata


def read_answer(response: str, how: str) -> str | None:
    """The answer in a response (`how` as in `ReasoningGymSource.answer`); None where there is none."""
    if how == "whole":
        return response.strip()
    if how == "last_line":
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        return lines[-1] if lines else None
    before_closing, closing, _ = response.rpartition("</answer>")
    _, opening, answer = before_closing.rpartition("<answer>")
    return answer.strip() if opening and closing else None


def told_with_place(
    failure: Failure, source: VerifiableSource, prompt: Prompt, label_key: str | None
) -> Failure:
    place = f"row {prompt.row_id}" + (f", column {label_key!r}" if source.type == "math" else "")
    return Failure(f"{place}: {failure.reason}")


class VerifiableReward:
    """The Serve replica in front of a pool of graders; CPU work, so it has no slot."""

    def __init__(self, source: VerifiableSource, label_key: str | None) -> None:
        self.source = source
        self.label_key = label_key
        self.pool = GraderPool(
            source.type, num_processes=source.num_processes, timeout_seconds=source.timeout_seconds
        )

    async def score(self, items: list[ScoreItem]) -> list[float | Failure]:
        return list(await asyncio.gather(*map(self._score_one, items)))

    async def _score_one(self, item: ScoreItem) -> float | Failure:
        source = self.source
        try:
            request = grading_request(source, item.prompt, item.response, self.label_key)
        except RewardError as error:
            return Failure(str(error))
        grade = await self.pool.ask(request)
        if isinstance(grade, Failure):
            return told_with_place(grade, source, item.prompt, self.label_key)
        if source.type == "math":
            return source.correct if grade else source.wrong
        return grade

    def __del__(self) -> None:  # Serve calls it when the replica goes
        if hasattr(self, "pool"):
            self.pool.close()


def verifiable_deployment(source: VerifiableSource, *, label_key: str | None) -> Any:
    deployment = serve.deployment(VerifiableReward).options(
        name="reward",
        num_replicas=source.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(source, label_key)


def check_installed(source: VerifiableSource) -> None:
    """That the package is there, and knows the data set. Raises `RewardError`."""
    try:
        if source.type == "math":
            import math_verify  # noqa: F401

            return
        gym = import_reasoning_gym()
    except ImportError as error:
        raise RewardError(
            f"a package that it needs does not import ({error}); pip install 'rayrlhf[verify]'"
        ) from error
    known = sorted(gym.factory.DATASETS)
    if source.dataset is not None and source.dataset not in known:
        close = get_close_matches(source.dataset, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
        raise RewardError(f"dataset: reasoning-gym has no {source.dataset!r}; {hint}")


def try_rows(source: VerifiableSource, prompts: Iterable[Prompt], label_key: str | None) -> None:
    """That the grader can use these rows. Raises `RewardError`, which names the row and the column."""
    with GraderPool(source.type, num_processes=1, timeout_seconds=source.timeout_seconds) as pool:
        for prompt in prompts:
            grade = pool.grade(grading_request(source, prompt, None, label_key))
            if isinstance(grade, Failure):
                raise RewardError(told_with_place(grade, source, prompt, label_key).reason)
