"""Router probe: tests on a small randomly initialised copy how an architecture routes tokens to experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rayrlhf.models.experts import Replay, Routed, Scoring, moe_layers, recorded, scores_of
from rayrlhf.models.probe import SEED, silent, whole
from rayrlhf.models.small_copy import LENGTHS, VOCABULARY, randomize, small_config

TOLERANCE = 1e-5
SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid")


@dataclass(frozen=True)
class RouterVerdict:
    """Result of the probe, e.g. RouterVerdict(2, "sigmoid", can_replay=True) for DeepSeek-V3."""

    layers: int  # mixture-of-experts layers of the copy
    scoring: Scoring | None = None  # None: unknown, so that no balance loss can be computed
    can_replay: bool = False  # whether its routers can be made to choose given experts
    reason: str = ""  # why not


_known: dict[str, RouterVerdict] = {}


def router_verdict(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> RouterVerdict:
    """How models with this config route tokens. Reads no weights."""
    key = config.to_json_string(use_diff=False)
    if key not in _known:
        with silent(), whole(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            try:
                _known[key] = _judge(config, trust_remote_code)
            except Exception as error:  # from transformers' or the checkpoint's code
                why = f"its small copy cannot be run: {type(error).__name__}: {error}".split("\n")[0]
                _known[key] = RouterVerdict(0, reason=why[:200])
    return _known[key]


def _judge(config: PreTrainedConfig, trust_remote_code: bool) -> RouterVerdict:
    small = small_config(copy.deepcopy(config), None)
    model: Any = AutoModelForCausalLM.from_config(
        small, attn_implementation="eager", trust_remote_code=trust_remote_code
    ).eval()
    randomize(model)
    layers = moe_layers(model)
    if not layers:
        return RouterVerdict(0, reason="it has no mixture-of-experts layers")
    ids = torch.randint(3, VOCABULARY, (1, max(LENGTHS)))

    def routed() -> list[Routed]:
        with recorded(layers) as recorder:
            model(input_ids=ids, use_cache=False)
        return recorder.routed()

    own = routed()
    matching: list[Scoring] = [each for each in SCORINGS if all(_is_weighted_by(r, each) for r in own)]
    scoring = matching[0] if matching else None
    if scoring is None:
        why = "its experts are weighted neither by softmax nor by sigmoid scores of router logits"
        if own[0].chosen.size(-1) == 1:
            why = "each token has one expert, whose weight does not show how its router scores"
        return RouterVerdict(len(layers), reason=why)
    given = [_other_choice(r) for r in own]
    Replay(layers).set(torch.stack(given, 1))
    replayed = routed()
    honoured = all(torch.equal(r.chosen, wanted) for r, wanted in zip(replayed, given, strict=True))
    honoured = honoured and all(_is_weighted_by(r, scoring) for r in replayed)
    why = "" if honoured else "its routers do not choose experts by one top-k of their scores"
    return RouterVerdict(len(layers), scoring, can_replay=honoured, reason=why)


def _is_weighted_by(routed: Routed, scoring: Scoring) -> bool:
    """Whether the weights of a token's experts are proportional to their scores."""
    scores = scores_of(routed.logits, scoring).gather(-1, routed.chosen)
    difference = scores / scores.sum(-1, keepdim=True) - _shares(routed.weights)
    return bool(difference.abs().max() < TOLERANCE) and routed.chosen.size(-1) > 1


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _other_choice(routed: Routed) -> Tensor:
    """Other experts than the router's, [N, K]: the next ones by number."""
    return (routed.chosen + 1) % routed.logits.size(-1)
