"""Reward source for verifiable answers: math-verify and the scorers of reasoning-gym."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ray import serve

from rayrlhf.config.reward import MathSource, ReasoningGymSource
from rayrlhf.isolation.frames import CodeError, CodeTimeout, ProcessDied
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import Hosted
from rayrlhf.placement.serve_status import failed_starts
from rayrlhf.reward.graders import import_reasoning_gym
from rayrlhf.reward.items import Failure, RewardError, ScoreItem, Unverified
from rayrlhf.samples import Prompt

VerifiableSource = MathSource | ReasoningGymSource

START_SECONDS = 120  # importing a grader's libraries takes 1 to 2 s, on a busy machine more
SLOW_SECONDS = 1.0  # while a grading takes longer, an additional process serves other requests
NUM_EXTRA_PROCESSES = 8


def grader_pool(
    kind: str, *, num_processes: int, timeout_seconds: float, slow_seconds: float = SLOW_SECONDS
) -> ProcessPool:
    """Grader processes, each killed and replaced when it misses its deadline.

    The time limits of the graders' libraries use signals, which only the main thread of a process can handle;
    a Serve replica has threads. And no signal handler interrupts a long computation inside C code.
    """
    hosted = Hosted(
        "rayrlhf.reward.grader_host:GraderHost",
        (kind,),
        start_timeout_seconds=START_SECONDS,
        timeout_seconds=timeout_seconds,
        # numpy's threads would count against its memory and cores.
        env_vars=(("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1")),
    )
    return ProcessPool(
        hosted,
        OutputLog(kind),
        num_processes=num_processes,
        num_extra=NUM_EXTRA_PROCESSES,
        slow_seconds=slow_seconds,
    )


async def start_graders(pool: ProcessPool) -> None:
    """Raises `RewardError` if they do not start."""
    try:
        await pool.start()
    except CodeError as error:
        [kind] = pool.hosted.arguments
        raise RewardError(
            f"the grader of {kind} does not start: {error}. "
            "Is its package installed on every node (pip install 'rayrlhf[verify]')?"
        ) from error


async def grade(pool: ProcessPool, request: dict[str, Any]) -> float | Failure | Unverified:
    """An answer that takes too long, or too much memory, is `Unverified` and is not graded again."""
    try:
        answer = await pool.call("grade", request)
    except CodeTimeout as error:
        return Unverified(0.0, f"grading {error}")
    except ProcessDied as error:
        return Unverified(0.0, f"grading it ended the grader: {error}")
    except CodeError as error:  # no grader starts
        return Failure(str(error))
    if "unverified" in answer:
        return Unverified(0.0, answer["unverified"])
    # The same row would fail again.
    return Failure(answer["failure"], final=True) if "failure" in answer else answer["reward"]


def grading_request(
    source: VerifiableSource, prompt: Prompt, response: str | None, label_key: str | None
) -> dict[str, Any]:
    """The request for the grader; without a response, to check that it can use the row. Raises `RewardError`,
    with the row and the column, for a row that lacks what the grader needs.
    """
    columns, row = prompt.columns, f"row {prompt.row_id}"
    if source.type == "math":
        assert label_key is not None  # validated by the config
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
    """The column `metadata`: an object, or JSON text of one, as in published data sets."""
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
    """The answer in a response (`how` as in `ReasoningGymSource.answer`); None if there is none."""
    if how == "whole":
        return response.strip()
    if how == "last_line":
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        return lines[-1] if lines else None
    before_closing, closing, _ = response.rpartition("</answer>")
    _, opening, answer = before_closing.rpartition("<answer>")
    return answer.strip() if opening and closing else None


def failure_with_row(
    failure: Failure, source: VerifiableSource, prompt: Prompt, label_key: str | None
) -> Failure:
    place = f"row {prompt.row_id}" + (f", column {label_key!r}" if source.type == "math" else "")
    return Failure(f"{place}: {failure.reason}", final=failure.final)


class VerifiableReward:
    """Serve replica in front of a pool of graders; CPU work, so it needs no slot."""

    async def __init__(self, source: VerifiableSource, label_key: str | None) -> None:
        self.source = source
        self.label_key = label_key
        self.pool = grader_pool(
            source.type, num_processes=source.num_processes, timeout_seconds=source.timeout_seconds
        )
        await start_graders(self.pool)

    async def score(self, items: list[ScoreItem]) -> list[float | Failure | Unverified]:
        return list(await asyncio.gather(*map(self._score_one, items)))

    async def _score_one(self, item: ScoreItem) -> float | Failure | Unverified:
        source = self.source
        try:
            request = grading_request(source, item.prompt, item.response, self.label_key)
        except RewardError as error:
            return Failure(str(error), final=True)
        graded = await grade(self.pool, request)
        if isinstance(graded, Failure):
            return failure_with_row(graded, source, item.prompt, self.label_key)
        if isinstance(graded, Unverified):
            wrong = source.wrong if source.type == "math" else 0.0
            return Unverified(wrong, f"row {item.prompt.row_id}: {graded.reason}")
        if source.type == "math":
            return source.correct if graded else source.wrong
        return graded

    def __del__(self) -> None:  # Serve calls it when the replica ends
        if hasattr(self, "pool"):
            self.pool.close()


def verifiable_deployment(source: VerifiableSource, *, label_key: str | None) -> Any:
    deployment = serve.deployment(VerifiableReward).options(
        name="reward",
        num_replicas=source.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(source.num_replicas),
    )
    return deployment.bind(source, label_key)


def check_installed(source: VerifiableSource) -> None:
    """Check that the package is installed and has the data set. Raises `RewardError`."""
    try:
        if source.type == "math":
            import math_verify  # noqa: F401

            return
        gym = import_reasoning_gym()
    except ImportError as error:
        raise RewardError(
            f"a required package cannot be imported ({error}); pip install 'rayrlhf[verify]'"
        ) from error
    known = sorted(gym.factory.DATASETS)
    if source.dataset is not None and source.dataset not in known:
        close = get_close_matches(source.dataset, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
        raise RewardError(f"dataset: reasoning-gym has no {source.dataset!r}; {hint}")


def try_rows(source: VerifiableSource, prompts: Iterable[Prompt], label_key: str | None) -> None:
    """Check that the grader can use these rows. Raises `RewardError` with the row and the column."""

    async def all_rows() -> None:
        pool = grader_pool(source.type, num_processes=1, timeout_seconds=source.timeout_seconds)
        try:
            await start_graders(pool)
            for prompt in prompts:
                graded = await grade(pool, grading_request(source, prompt, None, label_key))
                if isinstance(graded, Failure | Unverified):
                    failure = Failure(graded.reason)
                    raise RewardError(failure_with_row(failure, source, prompt, label_key).reason)
        finally:
            await pool.kill()

    asyncio.run(all_rows())
