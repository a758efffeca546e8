"""Learner: inference, optimizer steps and checkpoints of one module in one DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.metrics import Mean, Metrics, Sum
from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.config.train import OptimizerConfig
from rayrlhf.models.adapters import TrainedAdapter, not_adapted
from rayrlhf.train import collectives, trained_weights
from rayrlhf.train import frozen_checksums as frozen
from rayrlhf.train.deepspeed_engine import adapter_state_dict, full_state_dict, make_engine
from rayrlhf.train.expert_balance import ExpertBalance, ExpertLoad
from rayrlhf.train.offload import free_gradients, offload_states, reload_states
from rayrlhf.train.safe_load import only_tensors
from rayrlhf.train.sequence_parallel import own_outputs, sequence_ranks, together
from rayrlhf.train.weight_offload import WeightOffload
from rayrlhf.train.world_size import TAG, load_universal, read_layout, resized, write_layout

# forward(engine, batch) -> the module's output; loss(output, batch) -> (this micro-batch's share of the
# global objective, metrics). Shares add up over micro-batches and ranks.
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], tuple[Tensor, Metrics]]


class Term(NamedTuple):
    """A summand of the objective with its own micro-batches."""

    batches: Sequence[PackedBatch]
    forward: Forward
    loss: Loss


class Learner:
    """Trains `module`; every method is collective and must be called by all ranks with equally many micro-
    batches.
    """

    def __init__(
        self,
        module: nn.Module,
        train: OptimizerConfig,
        *,
        lr: float,
        dtype: torch.dtype,
        name: str,
        first_step: int = 0,
        aux_loss_coef: float = 0.0,
        saves_optimizer: bool = True,
    ) -> None:
        """
        Args:
            first_step: the first step of the run that trains this module; its schedule starts there.
            aux_loss_coef: of the balance loss of a mixture of experts.
            saves_optimizer: whether its checkpoints have the optimizer's states.
        """
        self.saves_optimizer = saves_optimizer
        self.name = name
        self.first_step = first_step
        self.base_lr = lr
        self.train = train
        self.bad_steps_in_a_row = 0
        self.experts = ExpertBalance.of(module, aux_loss_coef)
        self.engine: Any = make_engine(module, train, lr=lr, dtype=dtype)
        self.weight_offload = WeightOffload(module, pinned=collectives.device().type == "cuda")
        self._plain_norm = 0.0
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            # Stage 0 in fp32 uses torch's own optimizer, which neither reports the norm nor skips a step with
            # a bad gradient.
            self.engine.optimizer.register_step_pre_hook(self._clip_plain_gradients)

    @property
    def module(self) -> Any:
        return self.engine.module

    @torch.no_grad()
    def infer(self, batches: Sequence[PackedBatch], forward: Forward) -> list[Any]:
        """The module's outputs, one per micro-batch, without gradients and in evaluation mode."""
        self.engine.eval()
        return own_outputs(self.module, batches, lambda batch: forward(self.engine, batch))

    def update(self, *terms: Term, step: int, weight: float = 1.0) -> Metrics:
        """One optimizer step over the micro-batches of all terms; `step` sets the learning rate.

        Args:
            weight: number of items that the objective is a mean over, such as loss tokens; its weight in the
                mean over several optimizer steps.

        Returns:
            The metrics of the losses and `loss/<name>`, over micro-batches and ranks. A step whose gradient
            is not finite is skipped and counted in `loss/<name>_bad_steps`.

        Raises:
            FloatingPointError: for `train.max_bad_steps` of them in a row.
        """
        self.engine.train()
        lr = learning_rate(self.base_lr, self.train, step, first_step=self.first_step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        measured, objective = Metrics(), 0.0
        balance = self.experts.start_step(self._expert_load(terms))
        for term, batch, is_own in self._micro_batches(terms):
            with self.experts.recorded(batch) as routed:
                output = term.forward(self.engine, batch)
            share, metrics = term.loss(output, batch)
            # The engine averages gradients over ranks while shares add up over ranks: undo the average, here
            # only.
            total = (share + balance.loss_share(routed)) * collectives.world_size()
            self.engine.backward(total, scale_wrt_gas=False)
            if is_own:
                objective += share.item()
                measured += metrics.on_host()
        grad_norm = self._step()
        key = f"loss/{self.name}"
        measured = collectives.add_up(measured + Metrics({key: Sum(objective + balance.objective)}))
        objective = measured[key].result() or 0.0
        measured[key] = Mean(objective * weight, weight)
        return measured + self._step_metrics(grad_norm, lr) + balance.metrics(self.name)

    def _micro_batches(self, terms: Sequence[Term]) -> Iterator[tuple[Term, Any, bool]]:
        """All micro-batches that this rank computes, each with whether it is its own. Collective."""
        for term in terms:
            for batch, is_own in together(self.module, term.batches):
                yield term, batch, is_own

    @torch.no_grad()
    def _expert_load(self, terms: Sequence[Term]) -> ExpertLoad | None:
        """The step's load of each expert, from a forward pass of its micro-batches. Collective.

        None if it is not needed before the first backward pass.
        """
        num_batches = sum(len(term.batches) for term in terms) * sequence_ranks(self.module)
        if self.experts.coef == 0 or num_batches == 1:
            return None
        load = self.experts.no_load()
        # With the random numbers of the training pass, for dropout.
        device = collectives.device()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for term, batch, _ in self._micro_batches(terms):
                with self.experts.recorded(batch) as routed:
                    # The head is most of the pass with a large vocabulary.
                    term.forward(self.engine, batch.without_loss())
                load += self.experts.load(routed)
        return load.over_ranks()

    def _step(self) -> float:
        """Apply the accumulated gradients; returns their norm before clipping, inf when the step was
        skipped.
        """
        if isinstance(self.engine.optimizer, torch.optim.Optimizer) and not self._gradients_are_finite():
            self.engine.zero_grad()
            return math.inf
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(self._plain_norm if norm is None else norm)

    def _clip_plain_gradients(self, *_: Any) -> None:
        limit = self.train.max_grad_norm or math.inf
        self._plain_norm = float(nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit))

    def _gradients_are_finite(self) -> bool:
        # By the norm: a boolean tensor per gradient would take memory and time.
        norms = (p.grad.norm() for p in self.engine.module.parameters() if p.grad is not None)
        return collectives.max_over_ranks(sum(not bool(torch.isfinite(norm)) for norm in norms)) == 0

    def _step_metrics(self, grad_norm: float, lr: float) -> Metrics:
        """Metrics of this step; the gradient norm is averaged over the steps with a finite norm."""
        is_bad = not math.isfinite(grad_norm)
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if is_bad else 0
        if self.bad_steps_in_a_row >= self.train.max_bad_steps:
            raise FloatingPointError(
                f"the {self.name}'s gradient was not finite in {self.bad_steps_in_a_row} steps in a row "
                f"(train.max_bad_steps={self.train.max_bad_steps}): "
                "lower the learning rate or look at the rewards"
            )
        return Metrics(
            {
                f"loss/{self.name}_grad_norm": Mean(0.0, 0.0) if is_bad else Mean(grad_norm, 1.0),
                f"loss/{self.name}_lr": Mean(lr, 1.0),
                f"loss/{self.name}_bad_steps": Sum(float(is_bad)),
            }
        )

    def offload(self) -> int:
        """Keep only the weights on the device until `reload`; returns the bytes freed there. On a CPU only
        the gradients are freed, because there is nowhere to move the rest.
        """
        on_gpu = collectives.device().type == "cuda"
        return offload_states(self.engine) if on_gpu else free_gradients(self.engine)

    def offload_weights(self) -> None:
        """Keep the weights in host memory until `reload`, in addition to what `offload` has moved. Not on a
        CPU, and not under ZeRO-3.
        """
        if collectives.device().type == "cuda":
            self.weight_offload.to_host()

    def reload(self) -> None:
        if collectives.device().type == "cuda":
            self.weight_offload.to_device()  # first: DeepSpeed links its states to them
            reload_states(self.engine)

    def state_dict(self, submodule: nn.Module, *, on_this_rank: bool) -> dict[str, Tensor]:
        """All weights, with their adapters merged. Collective."""
        return full_state_dict(submodule, on_this_rank=on_this_rank)

    def trained_adapter(
        self, submodule: nn.Module, model: TrainedModelConfig, *, on_this_rank: bool
    ) -> TrainedAdapter | None:
        """The trained adapters without their base model; None without LoRA. Collective."""
        if model.lora is None:
            return None
        state = adapter_state_dict(submodule, on_this_rank=on_this_rank)
        return TrainedAdapter(model.lora, model.path, state, not_adapted(submodule))

    def save(self, folder: Path) -> None:
        """Save this rank's shard of the trained parameters and optimizer states, or the weights alone.
        Collective.
        """
        shards = folder / self.name
        if self.saves_optimizer:
            with frozen.left_out(self.module):
                self.engine.save_checkpoint(
                    str(shards), tag=TAG, save_latest=False, exclude_frozen_parameters=True
                )
        else:
            trained_weights.save(self.module, shards)
        sums = frozen.bit_sums(self.module)
        if collectives.rank() == 0:
            write_layout(shards, self.train.zero_stage, sums, self.bad_steps_in_a_row)

    def load(self, folder: Path) -> None:
        """Load a checkpoint, also one saved with another world size. Collective.

        Raises:
            ValueError: if the frozen weights are not those that the checkpoint was trained with.
        """
        shards = folder / self.name
        layout = read_layout(shards)
        frozen.check(layout["frozen"], self.module)
        self.bad_steps_in_a_row = layout.get("bad_steps_in_a_row", 0)
        if trained_weights.has_weights(shards):
            trained_weights.load(self.engine, shards)
            return
        if layout["workers"] == collectives.world_size() or not _has_shards(shards):
            with only_tensors(shards):
                path, _ = self.engine.load_checkpoint(str(shards), tag=TAG, custom_load_fn=frozen.load)
        else:
            with resized(shards) as universal:
                path, _ = load_universal(self.engine, universal)
        if path is None:
            raise FileNotFoundError(f"no {self.name} checkpoint in {folder}")


def _has_shards(folder: Path) -> bool:
    """Whether the optimizer states are sharded over workers; torch's own optimizer (stage 0) saves all."""
    return any((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt"))


def learning_rate(base: float, train: OptimizerConfig, step: int, *, first_step: int = 0) -> float:
    """The learning rate of 0-based `step`: from `first_step` on linear warm-up, then constant, linear or
    cosine decay to `min_lr_ratio` at the end of the run.
    """
    step, total_steps = step - first_step, train.total_steps - first_step
    if step < train.warmup_steps:
        return base * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return base
    progress = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    remaining = 1 - progress if train.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return base * (train.min_lr_ratio + (1 - train.min_lr_ratio) * remaining)
