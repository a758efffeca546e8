"""Default learning rates of the supervised jobs, one per job.

Schedule and warm-up are those of Llama 2's fine-tuning and reward models (arXiv 2307.09288): a cosine, with a
warm-up over 3 % of the steps.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from rayrlhf.config.base import NonNegativeNumber
from rayrlhf.config.train import OptimizerConfig, SupervisedTrainConfig

# The best learning rates of LoRA are an order of magnitude above those of full training: arXiv 2405.09673.
LORA_LR_FACTOR = 10.0

T = TypeVar("T", bound=OptimizerConfig)


class _Cosine(SupervisedTrainConfig):
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""


class SftTrainConfig(_Cosine):
    lr: NonNegativeNumber = 1e-5
    """Learning rate (arXiv 2307.09288 has 2e-5, 2411.15124 5e-6 for 8B); ten times the default with LoRA."""
    dropout: bool = True
    """Train with the dropout of the model's own config.json, where it has some (GPT-2 has 0.1, Llama 0)."""


class DistillationTrainConfig(SftTrainConfig):
    dropout: bool = False
    """Train with the dropout of the student's config.json, also where it is compared with the teacher."""


class RewardTrainConfig(_Cosine):
    lr: NonNegativeNumber = 9e-6
    """Learning rate (arXiv 2203.02155; 2307.09288 has 1e-5); ten times the default with LoRA."""


class PreferenceTrainConfig(_Cosine):
    lr: NonNegativeNumber = 5e-7
    """Learning rate (arXiv 2310.16944 and 2402.01306); ten times the default with LoRA."""


def with_lora_lr(train: T, model: Any) -> T:
    """`train` with its default learning rate times `LORA_LR_FACTOR` if only adapters are trained."""
    if model is None or model.lora is None or "lr" in train.model_fields_set:
        return train
    return train.model_copy(update={"lr": float(f"{train.lr * LORA_LR_FACTOR:.6g}")})
