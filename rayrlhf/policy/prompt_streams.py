"""Prompt data of a run: prepared once on the driver, then streamed to the workers from any position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.data import PromptDataConfig, SourceConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.batch_plan import FixedPlan, PromptPlan
from rayrlhf.data.prepare import prepare_prompts
from rayrlhf.data.sources.files import Split
from rayrlhf.data.store import PromptStore
from rayrlhf.data.stream import prompt_dataset, step_ranges
from rayrlhf.policy.evaluate import eval_plan
from rayrlhf.policy.job import PolicyJob
from rayrlhf.storage.folder import DATA_FOLDER, Folder
from rayrlhf.storage.run_file import run_file
from rayrlhf.train.checkpoint import newest_first_prompt_batch, newest_step


@dataclass(frozen=True)
class Stores:
    train: PromptStore
    held_out: PromptStore | None
    texts: PromptStore | None  # PPO-ptx

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the training data, by config key."""
        found = {"data.train": self.train.fingerprint}
        return found if self.texts is None else found | {"data.ptx": self.texts.fingerprint}

    def num_eval_prompts(self, config: PolicyRunConfig) -> int:
        if self.held_out is None:
            return 0
        return min(len(self.held_out), config.eval.num_prompts or len(self.held_out))


def prepare_stores(config: PolicyRunConfig, run_path: Path, say: Callable[[str], None]) -> Stores:
    """Read, render and tokenize all prompts. Raises `DataError`."""

    def prepare(
        name: str,
        sources: list[SourceConfig],
        data: PromptDataConfig,
        split: Split = "train",
        as_texts: bool = False,
    ) -> PromptStore:
        store = prepare_prompts(
            sources,
            data,
            config.model.path,
            run_path / DATA_FOLDER / f"{name}.arrow",
            config.run.seed,
            split=split,
            trust_remote_code=config.model.trust_remote_code,
            as_texts=as_texts,
        )
        say(f"{name} prompts: " + ", ".join(f"{n} {what}" for what, n in store.counts.items() if n))
        return store.stored(run_file(config.run, f"{DATA_FOLDER}/{name}.arrow"))

    data = config.data
    train = prepare("train", data.train, data)
    if len(train) < config.rollout.prompts_per_step:
        say(
            f"warning: data.train has {len(train)} prompts, fewer than rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step}: prompts repeat within a step"
        )
    return Stores(
        train=train,
        held_out=prepare("eval", data.eval, data, "eval") if data.eval else None,
        texts=prepare("ptx", data.ptx.sources, text_config(data), as_texts=True) if data.ptx else None,
    )


def text_config(data: PromptDataConfig) -> PromptDataConfig:
    """Settings for reading the texts of data.ptx: unchanged, long ones truncated."""
    assert data.ptx is not None
    return PromptDataConfig(
        train=data.ptx.sources,
        prompt_key=data.ptx.text_key,
        apply_chat_template=False,
        max_prompt_tokens=data.ptx.max_tokens,
        on_long_prompt="truncate",
        on_bad_row=data.on_bad_row,
    )


def num_prompt_batches(config: PolicyRunConfig) -> int:
    """Upper bound of a run's prompt batches: dynamic sampling takes several per step, the pool some ahead."""
    dynamic = config.algorithm.dynamic_sampling
    per_step = dynamic.max_prompt_batches if dynamic else 1
    ahead = 0
    if config.rollout.max_staleness is not None:
        ahead = math.ceil(config.rollout.max_staleness + config.rollout.oversampling)
    return config.train.num_steps * per_step + ahead


def training_streams(job: PolicyJob, stores: Stores, *, storage: Folder) -> dict[str, Any]:
    """Ray Data sets by name, for a trainer, as functions that create them. They are called whenever the
    workers (re)start, so that a resumed stream starts at its position.
    """
    config = job.config
    workers, seed = config.train.num_workers, config.run.seed
    step_ranges(
        0, num_prompt_batches(config), workers, config.rollout.prompts_per_step
    )  # raises for too many
    batches = PromptPlan(
        len(stores.train),
        config.rollout.prompts_per_step,
        num_prompt_batches(config),
        workers,
        seed,
        config.data.shuffle,
    )

    file = stores.train.file  # `Stores` would bring this module, and all that it imports, to the controller

    def train() -> Any:
        return prompt_dataset(file, batches, min(newest_first_prompt_batch(storage), len(batches) - 1))

    streams: dict[str, Any] = {"train": train}
    if stores.held_out is not None and job.num_eval_prompts:
        held_out, plan = stores.held_out, FixedPlan(eval_plan(job.num_eval_prompts, workers))
        streams["eval"] = lambda: prompt_dataset(held_out.file, plan, 0)
    if stores.texts is not None:
        assert config.data.ptx is not None
        texts, steps = stores.texts, config.train.num_steps
        order = PromptPlan(len(texts), config.data.ptx.texts_per_step, steps, workers, seed)
        streams["ptx"] = lambda: prompt_dataset(texts.file, order, min(newest_step(storage), steps - 1))
    return streams
