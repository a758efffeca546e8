"""Ray Data's worker of batch inference: it takes a shard's row ids and leaves the shard's file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from ray import serve
from torch import Tensor

from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.ends import end_of_turn_id, ends_of
from rayrlhf.data.store import PromptStore, prompts_of
from rayrlhf.inference.shards import Shard, ShardFolder, answered_row, failed_row, rows_of
from rayrlhf.reward.client import RewardClient, RewardFailure, RewardSource
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.reward.deployments import RewardApp
from rayrlhf.rollout.background import Background
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.samples import Prompt, Sample

RETRY_SECONDS = 1.0
RESULT_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("rows", pa.int64()),
        ("failed_rows", pa.int64()),
        ("response_tokens", pa.int64()),
        ("score_sum", pa.float64()),
        ("scored", pa.int64()),
        ("warning", pa.string()),  # what failed, if anything did
        ("problem", pa.string()),  # why the shard was not written; empty when it was
    ]
)


@dataclass(frozen=True)
class GenerateJob:
    """What the driver hands to every worker."""

    config: GenerateRunConfig
    run_id: str
    reward_apps: tuple[RewardApp, ...]
    store_path: Path
    folder: ShardFolder
    num_workers: int

    @property
    def rollout_app(self) -> str:
        return f"{self.run_id}-rollout"

    @property
    def board(self) -> str:
        return f"{self.run_id}-board"

    @property
    def prompts_in_flight(self) -> int:
        """Of one worker. All of them together ask for more than the engines work on, so that none idles."""
        rollout = self.config.rollout
        samples = 2 * rollout.num_engines * rollout.max_concurrent_requests
        return max(1, samples // (rollout.group_size * self.num_workers))


class Answers(Protocol):
    async def samples(self, prompt: Prompt) -> list[Sample]:
        """The prompt's samples, in the order of their indices."""
        ...


class Generated:
    """Samples of the engines. Their seeds depend on (run.seed, row, sample) alone."""

    def __init__(self, job: GenerateJob) -> None:
        self.rollout = job.config.rollout
        self.client = RolloutClient(
            serve.get_app_handle(job.rollout_app),
            self.rollout,
            seed=job.config.run.seed,
            ends_of=ends_of(job.config.model, job.config.data),
        )

    async def samples(self, prompt: Prompt) -> list[Sample]:
        stream = self.client.samples(
            prompt,
            group_id=prompt.row_id,
            group_size=self.rollout.group_size,
            min_version=0,
            sampling=self.rollout.sampling,
        )
        return sorted([sample async for sample in stream], key=lambda sample: sample.sample_index)


class Given:
    """The responses in a column of the rows, closed as a model closes its own."""

    def __init__(self, config: GenerateRunConfig) -> None:
        assert config.data.response_key is not None
        self.key = config.data.response_key
        self.tokenizer: Any = prompt_tokenizer(
            config.model.path, config.model.trust_remote_code, read_chat_template(config.data)
        )
        end_of_turn = end_of_turn_id(self.tokenizer) if config.data.apply_chat_template else None
        self.end: int | None = self.tokenizer.eos_token_id if end_of_turn is None else end_of_turn

    async def samples(self, prompt: Prompt) -> list[Sample]:
        response = prompt.columns.get(self.key)
        if not isinstance(response, str):
            raise ValueError(f"column {self.key!r} (data.response_key) holds no text: {response!r:.80}")
        ids = self.tokenizer(response, add_special_tokens=False, verbose=False).input_ids
        ids = [*ids, *([] if self.end is None else [self.end])]
        return [
            Sample(
                group_id=prompt.row_id,
                sample_index=0,
                prompt=prompt,
                response_ids=ids,
                response=response,
                rollout_logprobs=[0.0] * len(ids),
                loss_mask=[1] * len(ids),
                policy_versions=[],
                truncated=False,
            )
        ]


class Scorer:
    """Raw rewards and scores of samples, each by itself: no statistic runs over them."""

    def __init__(self, job: GenerateJob) -> None:
        reward = job.config.reward
        assert reward is not None
        sources = [
            RewardSource(name, weight, serve.get_app_handle(app)) for name, weight, app in job.reward_apps
        ]
        self.client = RewardClient(sources, reward)
        self.names = reward.source_names
        self.combiner = RewardCombiner(reward, response_limit=job.config.rollout.sampling.max_new_tokens)

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        return self.combiner.combine(await self.client.score(samples), _alone, normalize=False)


def _alone(local: Tensor) -> Tensor:
    return local


class ShardWorker:
    """Stands in a Ray Data stage. Many rows of a shard are under way at once, their number is bounded."""

    def __init__(self, job: GenerateJob) -> None:
        self.job = job
        self.section = job.config.generate
        self.answers: Answers = Given(job.config) if job.config.data.response_key else Generated(job)
        self.scorer = Scorer(job) if job.config.reward is not None else None
        self.background = Background()

    def __call__(self, block: pa.Table) -> pa.Table:
        results = [self._answer(Shard(**row)) for row in block.to_pylist()]
        return pa.Table.from_pylist(results, RESULT_SCHEMA)

    def _answer(self, shard: Shard) -> dict[str, Any]:
        store = PromptStore.open(self.job.store_path)
        prompts = prompts_of(store.take(rows_of(shard, self.section.first_row, len(store))))
        answered = self.background.run(self._all(prompts))
        failures = [outcome for outcome in answered if isinstance(outcome, str)]
        samples = [sample for outcome in answered if not isinstance(outcome, str) for sample in outcome]
        problem = self._problem(failures, samples, len(shard))
        warnings = [f"{len(failures)} rows failed: {failures[-1]}"] if failures else []
        if self.scorer is not None:
            failed = self.scorer.client.drain_failures()
            warnings += [f"{name}: {what}" for name, what in failed.items()]
        if not problem:
            self.job.folder.write(shard, [self._row(*both) for both in zip(prompts, answered, strict=True)])
        scores = [sample.score for sample in samples if sample.score is not None]
        return {
            "index": shard.index,
            "rows": len(shard),
            "failed_rows": len(failures),
            "response_tokens": sum(len(sample.response_ids) for sample in samples),
            "score_sum": sum(scores),
            "scored": len(scores),
            "warning": "; ".join(warnings),
            "problem": problem,
        }

    def _row(self, prompt: Prompt, outcome: list[Sample] | str) -> dict[str, Any]:
        if isinstance(outcome, str):
            return failed_row(prompt, outcome, group_size=self.job.config.rollout.group_size)
        return answered_row(prompt, outcome, names=self.scorer.names if self.scorer else None)

    def _problem(self, failures: Sequence[str], samples: Sequence[Sample], num_rows: int) -> str:
        """Why so much of the shard failed that it is not worth writing; empty when it is."""
        if too_many(len(failures), num_rows, self.section.max_failed_fraction):
            return (
                f"{len(failures)} of {num_rows} rows could not be generated after {self.section.retries} "
                f"retries (generate.max_failed_fraction={self.section.max_failed_fraction:g}). "
                f"Last error: {failures[-1]}"
            )
        if self.scorer is not None and samples:
            try:
                self.scorer.client.check(sum(sample.score is None for sample in samples), len(samples))
            except RewardFailure as error:
                return str(error)
        return ""

    async def _all(self, prompts: Sequence[Prompt]) -> list[list[Sample] | str]:
        """Per prompt its samples, or why there are none."""
        places = asyncio.Semaphore(self.job.prompts_in_flight)

        async def one(prompt: Prompt) -> list[Sample] | str:
            async with places:
                return await self._row_of(prompt)

        return list(await asyncio.gather(*map(one, prompts)))

    async def _row_of(self, prompt: Prompt) -> list[Sample] | str:
        reason = ""
        for attempt in range(self.section.retries + 1):
            if attempt:
                await asyncio.sleep(RETRY_SECONDS)
            try:
                samples = await self.answers.samples(prompt)
            except Exception as error:  # the border to the engines: a row that fails must not end the others
                lines = str(error).strip().splitlines()
                reason = f"{type(error).__name__}: {lines[-1]}" if lines else repr(error)
                continue
            return await self.scorer.score(samples) if self.scorer is not None else samples
        return reason


def too_many(num_failed: int, num_rows: int, allowed_fraction: float) -> bool:
    """More than the share that is allowed, or all of them."""
    return num_failed > min(allowed_fraction * num_rows, num_rows - 1)


@dataclass
class Pace:
    """Rows and tokens of this start, for the console."""

    started: float
    rows: int = 0
    response_tokens: int = 0
    score_sum: float = 0.0
    scored: int = 0

    def add(self, result: dict[str, Any]) -> None:
        self.rows += result["rows"]
        self.response_tokens += result["response_tokens"]
        self.score_sum += result["score_sum"]
        self.scored += result["scored"]

    def line(self, num_left: int) -> str:
        seconds = max(1e-9, time.monotonic() - self.started)
        left = num_left * seconds / self.rows
        score = f"score {self.score_sum / self.scored:+.3f}  " if self.scored else ""
        return (
            f"{self.response_tokens / seconds:.0f} tok/s  {score}{num_left} rows left  "
            f"{int(left) // 60}:{int(left) % 60:02d} min"
        )
