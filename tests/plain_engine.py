"""Learners without DeepSpeed: the real one around a module under torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.config.train import OptimizerConfig
from rayrlhf.train.expert_balance import ExpertBalance
from rayrlhf.train.learner import Learner, Term


class PlainEngine:
    """What a learner calls of its engine, as DeepSpeed does it with stage 0 in fp32."""

    def __init__(self, module: nn.Module, *, is_frozen: bool) -> None:
        """`is_frozen`: optimizer steps are taken and move nothing."""
        self.module = module
        self.is_frozen = is_frozen
        self.optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        before = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.optimizer.step()
        self.zero_grad()
        if self.is_frozen:
            with torch.no_grad():
                for parameter, value in zip(self.module.parameters(), before, strict=True):
                    parameter.copy_(value)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> None:
        """torch's optimizer does not know it."""


class PlainLearner(Learner):
    def __init__(
        self,
        module: nn.Module,
        train: OptimizerConfig,
        *,
        lr: float = 0.1,
        name: str = "actor",
        first_step: int = 0,
        is_frozen: bool = False,
        aux_loss_coef: float = 0.0,
    ) -> None:
        self.name = name
        self.first_step = first_step
        self.base_lr = lr
        self.train = train
        self.bad_steps_in_a_row = 0
        self.experts = ExpertBalance.of(module, aux_loss_coef)
        self.engine = PlainEngine(module, is_frozen=is_frozen)
        self._plain_norm = 0.0
        self.engine.optimizer.register_step_pre_hook(self._clip_plain_gradients)
        self.updates: list[list[int]] = []  # loss tokens of each term, per optimizer step
        self.steps: list[int] = []

    def update(self, *terms: Term, step: int, weight: float = 1.0) -> Metrics:
        measured = super().update(*terms, step=step, weight=weight)
        self.steps.append(step)
        self.updates.append([sum(int(b.loss_mask.sum()) for b in term.batches) for term in terms])
        return measured
