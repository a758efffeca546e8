"""Every supervised task learns the same however its samples are packed and on however many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayrlhf.config.supervised import JOBS
from rayrlhf.data.batch_plan import plan_step
from rayrlhf.samples import Example, TokenSequence

NUM_STEPS, NUM_EXAMPLES = 3, 9
ROOMY, TIGHT = 512, 80  # tokens per micro-batch: a few of all sequences, or hardly more than the longest pair

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

LORA: dict[str, Any] = {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}}
TASKS: dict[str, dict[str, Any]] = {
    "sft": {"job": "sft"},
    "rm": {"job": "rm"},
    "prm": {"job": "prm", "data": {"step_token": "<|extra|>"}},
    "dpo": {"job": "dpo", "algorithm": {"nll_coef": 0.3}},
    "ipo": {"job": "dpo", "algorithm": {"loss": "ipo"}},
    "cdpo": {"job": "dpo", "algorithm": {"loss": "cdpo", "label_smoothing": 0.1}},
    "orpo": {"job": "dpo", "algorithm": {"loss": "orpo"}},
    "simpo": {"job": "dpo", "algorithm": {"loss": "simpo", "beta": 2.0, "gamma": 0.5}},
    "kto": {"job": "kto", "algorithm": {"desirable_weight": 1.5}},
    "kd": {"job": "kd", "teacher": {}},
    "rm-qlora": {"job": "rm", "model": {**LORA, "quantization": "nf4"}},
    "kto-lora": {"job": "kto", "model": LORA},
    "dpo-lora": {"job": "dpo", "model": LORA},
    "dpo-lora-copy": {"job": "dpo", "model": LORA, "ref": {}},  # the reference is a separate model
}
# One of each kind of batch and target; `make test-long` runs the others.
ALWAYS = ("sft", "rm", "dpo", "kd", "kto-lora")
SHARING = ("sft", "rm", "prm", "dpo", "kto-lora")  # kd cannot: a teacher reads whole sequences


def examples_of(task: str, step: int) -> list[Example]:
    rng = np.random.default_rng([23, step])
    pairs = TASKS[task]["job"] in ("rm", "dpo", "kto")
    examples = []
    for row in range(NUM_EXAMPLES):
        prompt = rng.integers(8, 264, size=int(rng.integers(2, 8))).tolist()
        sequences = []
        for _ in range(2 if pairs else 1):
            response = rng.integers(8, 264, size=int(rng.integers(2, 30))).tolist()
            mask = [0] * len(prompt) + [1] * len(response)
            targets: list[float] = []
            if task == "prm":
                mask = [0] * len(prompt) + rng.integers(0, 2, size=len(response)).tolist()
                targets = [float(rng.choice([0.0, 1.0, 0.3])) * m for m in mask]
            sequences.append(TokenSequence([*prompt, *response], mask, targets))
        examples.append(Example(row, tuple(sequences), float(row % 2)))
    return examples


def make_config(
    task: str, folder: Path, model: str, teacher: str, budget: int, *, sequence_parallel: int = 1
) -> Any:
    given = TASKS[task]
    tree: dict[str, Any] = {
        "run": {"name": task, "dir": str(folder)},
        "model": {"path": model, **given.get("model", {}), "sequence_parallel": sequence_parallel},
        "data": {"train": "none.jsonl", "max_tokens": budget // 2, **given.get("data", {})},
        "train": {
            "num_steps": NUM_STEPS,
            "num_workers": sequence_parallel,
            "zero_stage": 3 if task in ("dpo", "rm", "kd", "rm-qlora", "dpo-lora", "dpo-lora-copy") else 2,
            "max_tokens_per_micro_batch": budget,
            "lr": 1e-3,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
        },
    }
    if "algorithm" in given:
        tree["algorithm"] = given["algorithm"]
    if "ref" in given:
        tree["ref"] = {"path": model}
    if "teacher" in given:
        tree["teacher"] = {"path": teacher}
    return JOBS[given["job"]].model_validate(tree)


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """All tasks one after the other, in one group of workers."""
    from rayrlhf.supervised.setup import TASKS as TASKS_OF_JOBS
    from rayrlhf.supervised.task import Objective, TaskSetting, total_weight
    from rayrlhf.train.collectives import Ranks

    torch.set_num_threads(1)
    ranks = Ranks()
    results: dict[str, Any] = {}
    for name, config in arguments["configs"].items():
        torch.manual_seed(0)
        task = TASKS_OF_JOBS[config.job](TaskSetting(config, ranks))
        history = []
        for step in range(NUM_STEPS):
            examples = examples_of(name, step)
            lengths = np.array([example.num_tokens for example in examples])
            plan = plan_step(
                range(len(examples)),
                lengths,
                world_size=ranks.world_size,
                budget_tokens=config.train.max_tokens_per_micro_batch,
            )
            mine = [[examples[row] for row in pack] for pack in plan.ranks[ranks.rank]]
            batches = task.prepare(mine, "train")
            objective = Objective(task, total_weight(task, batches, ranks))
            history.append(task.learner.update(objective.term(batches), step=step).results())
        state = task.learner.state_dict(task.learner.module, on_this_rank=ranks.rank == 0)
        results[name] = {
            "history": history,
            "weights": {key: tensor.numpy() for key, tensor in state.items()},
        }
    return results


def run_on(num_workers: int, folder: Path, configs: dict[str, Any]) -> dict[str, Any]:
    result = TorchTrainer(
        train,
        train_loop_config={"configs": configs},
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"ranks-{num_workers}", storage_path=str(folder)),
    ).fit()
    assert result.return_value is not None
    return result.return_value


@pytest.mark.parametrize(
    "tasks",
    [
        pytest.param(ALWAYS, id="always"),
        pytest.param([task for task in TASKS if task not in ALWAYS], id="others", marks=pytest.mark.long),
    ],
)
def test_packing_ranks_and_shared_sequences_make_no_difference(
    tasks: Sequence[str], tmp_path: Path, tiny_model: str
) -> None:
    from tests.tiny_model import make_tiny_model

    teacher = make_tiny_model(tmp_path / "teacher", seed=5)

    def configs(budget: int, tasks: Iterable[str], **options: int) -> dict[str, Any]:
        return {task: make_config(task, tmp_path, tiny_model, teacher, budget, **options) for task in tasks}

    packed = run_on(1, tmp_path / "packed", configs(ROOMY, tasks))
    if "dpo-lora-copy" in tasks:
        off, copy = (packed[task]["history"] for task in ("dpo-lora", "dpo-lora-copy"))
        assert off == copy, "a model without its adapters is the reference"
        assert off[-1]["reward/margin"] != 0 and packed["rm-qlora"]["history"][-1]["reward/margin"] != 0
    sharing = [task for task in SHARING if task in tasks]
    for other in (
        run_on(2, tmp_path / "two", configs(TIGHT, tasks)),
        run_on(2, tmp_path / "shared", configs(ROOMY, sharing, sequence_parallel=2)),
    ):
        for task in other:
            wanted = packed[task]
            for losses, losses_packed in zip(other[task]["history"], wanted["history"], strict=True):
                assert losses == pytest.approx(losses_packed, rel=1e-5, abs=1e-5), task
            for name, weights in wanted["weights"].items():
                distance = np.linalg.norm(other[task]["weights"][name] - weights)
                assert distance / max(np.linalg.norm(weights), 1e-3) < 2e-5, f"{task}: {name}"
