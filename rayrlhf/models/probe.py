"""Architecture probe: tests with a small randomly initialised copy whether a model is computed correctly.

The copy's log-probabilities of three sequences in one packed stream, computed by the training code, are
compared with those of the model's own forward pass on each sequence alone. An architecture that is only
correct with one sequence per stream gets such streams; one that is never correct is rejected. Takes seconds,
reads no weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations import deepspeed as zero3

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.models.attention import VARLEN_SDPA, attending_layers
from rayrlhf.models.cpu_products import products_in
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.parallel import PackedModel
from rayrlhf.models.small_copy import LENGTHS, VOCABULARY, randomize, small_config
from rayrlhf.models.streams import Streams, hidden_states
from rayrlhf.models.vision import is_vision_language
from rayrlhf.prefixes import SharedPrefixes

TOLERANCE = 1e-4  # of log-probabilities, in fp32
SEED = 5
MAX_PARAMETERS = 20_000_000  # limit of a copy: a config with unknown width names stays large
Head = Literal["policy", "values"]  # language model; decoder with a head for values or scores
OWN_KERNELS = ("sdpa", "eager")


@dataclass(frozen=True)
class Verdict:
    """Result of the probe, e.g. Verdict(Streams(), 1.9e-06, attending=2, layers=2) for Llama."""

    streams: Streams | None  # None: rejected
    deviation: float  # largest difference of a log-probability (or hidden state) with these streams
    attending: int = 0  # layers of the copy that use our attention kernel
    layers: int = 0  # layers of the copy
    reason: str = ""  # why not packed
    packed_deviation: float = float("nan")  # the deviation with all sequences in one stream
    shares_prefixes: bool = False  # right if a prefix that sequences share is computed once

    @property
    def name(self) -> str:
        if self.streams is None:
            return "refused"
        return "supported packed" if self.streams.is_packed else "supported one sequence per stream"

    @property
    def shares_sequences(self) -> bool:
        """Whether sequences can be sharded over ranks (model.sequence_parallel)."""
        return self.streams is not None and self.streams.is_packed and self.attending == self.layers


class Refusal(Exception):
    """The architecture cannot be used; the message says why."""


def verdict_of(
    config: PreTrainedConfig, *, longest: int | None, head: Head = "policy", trust_remote_code: bool = False
) -> Verdict:
    """Probe a model with this config for a run whose longest sequence has `longest` tokens (None: any)."""
    key = (config.to_json_string(use_diff=False), longest_kind(config, longest), head)
    if key not in _known:
        # TOLERANCE is one of fp32: this process may multiply with factors rounded to bf16.
        with silent(), products_in("ieee"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            _known[key] = _judge(config, longest, head, trust_remote_code)
    return _known[key]


_known: dict[Any, Verdict] = {}


def longest_kind(config: PreTrainedConfig, longest: int | None) -> tuple[bool, ...]:
    """Which of the model's limits the longest sequence exceeds; the probe depends on nothing else of it."""
    text: Any = config.get_text_config()
    names = (
        "sliding_window",
        "attention_chunk_size",
        "local_attention",
        "window_size",
        "max_position_embeddings",
    )
    limits = [limit for name in names if isinstance(limit := getattr(text, name, None), int)]
    limits += [limit for _, limit in rope_limits(config)]
    return tuple(longest is None or longest > limit for limit in limits)


def rope_limits(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """(type, tokens) of rotary embeddings whose frequencies change for longer sequences."""
    text: Any = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    for rope in [found, *(each for each in found.values() if isinstance(each, dict))]:
        if rope.get("rope_type") == "longrope":
            limit = rope.get("original_max_position_embeddings")
            yield "longrope", limit or text.original_max_position_embeddings
        elif rope.get("rope_type") == "dynamic":
            yield "dynamic", text.max_position_embeddings


def _judge(config: PreTrainedConfig, longest: int | None, head: Head, trust_remote_code: bool) -> Verdict:
    subject = _Decoder
    if head == "policy":
        subject = _VisionPolicy if is_vision_language(config) else _Policy
    try:
        small = _attempt("no small copy of it could be made", small_config, config, longest)
        probe = subject(small, trust_remote_code)
        own = probe.own()
        probe.check_own(own)
        return _best(probe, probe.comparable(own), [limit for _, limit in rope_limits(small)], config)
    except Refusal as refusal:
        return Verdict(None, float("nan"), reason=str(refusal))


def _best(probe: Any, expected: list[Tensor], limits: list[int], config: PreTrainedConfig) -> Verdict:
    """The fastest streams that are correct. Raises `Refusal`."""
    choices = [Streams(), *(Streams(limit) for limit in limits), Streams(0)]
    choices += [Streams(0, kernel) for kernel in OWN_KERNELS]
    tried: list[tuple[Streams, float, str]] = []
    for streams in choices:
        try:
            found, attending = probe.ours(streams)
        except Exception as error:  # transformers' code may raise anything on an unusual call
            tried.append((streams, float("nan"), _message(error)))
            continue
        deviation = _distance(found, expected)
        tried.append((streams, deviation, ""))
        if deviation <= TOLERANCE:
            return Verdict(
                _as_in_the_model(streams, config),
                deviation,
                attending=attending,
                layers=probe.small.get_text_config().num_hidden_layers,
                reason=_why_not_packed(tried),
                packed_deviation=tried[0][1],
                # Rotary embeddings with a limit may get several streams, depending on the run's lengths.
                shares_prefixes=streams.is_packed and not limits and _shares_prefixes(probe),
            )
    raise Refusal(_why_never(tried, probe))


def _shares_prefixes(probe: Any) -> bool:
    ids, positions, ends = probe.pair()
    prefixes = SharedPrefixes.of(ends, ids, positions)
    assert prefixes is not None
    try:
        found = probe.outputs(ids, positions, ends, prefixes)
    except Exception:  # like `ours`: layers that mix tokens otherwise, and transformers' code
        return False
    return _distance([found], [probe.outputs(ids, positions, ends, None)]) <= TOLERANCE


def _as_in_the_model(streams: Streams, config: PreTrainedConfig) -> Streams:
    """The streams with the model's limit instead of the small copy's."""
    if not streams.longest_packed:
        return streams
    return streams._replace(longest_packed=min(limit for _, limit in rope_limits(config)))


def _why_not_packed(tried: list[tuple[Streams, float, str]]) -> str:
    """Why the choices before the last one, which is correct, failed."""
    streams, deviation, failure = tried[-1][0], *tried[0][1:]
    if streams.is_packed:
        return ""
    if streams.attention is not None:
        return f"it cannot attend through our kernel ({failure})" if failure else "its attention is not ours"
    if streams.longest_packed:
        return f"its rotary frequencies are those of the stream's longest sequence ({deviation:.1g} nats)"
    return failure or f"its layers carry state from one sequence into the next ({deviation:.1g} nats)"


def _why_never(tried: list[tuple[Streams, float, str]], probe: Any) -> str:
    deviations = [deviation for _, deviation, failure in tried if not failure]
    if not deviations:
        return f"it cannot be called as training calls it: {tried[-1][2]}"
    if (what := probe.fault_of_its_head()) is not None:
        return what
    return f"what is computed here differs from the model's own by {min(deviations):.2g}"


class _Subject:
    """A small copy and its test sequences."""

    make: Any

    def __init__(self, small: PreTrainedConfig, trust_remote_code: bool) -> None:
        self.small = small
        self.trust_remote_code = trust_remote_code
        generator = torch.Generator().manual_seed(SEED)
        self.sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
        self.kernel, self.module = _attempt("its small copy cannot be made", self._first)
        self.weights = self.module.state_dict()

    def _first(self) -> tuple[str, Any]:
        """With a kernel of transformers; every model supports eager."""
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in self._build("eager").parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"it has {size:,} parameters, more than a small copy of {MAX_PARAMETERS:,}")
        module = self._build("eager")
        randomize(module)
        return "eager", module

    def _build(self, kernel: str) -> Any:
        config = copy.deepcopy(self.small)  # the model writes the kernel's name to it
        with whole():
            module = self.make(config, attn_implementation=kernel, trust_remote_code=self.trust_remote_code)
        return module.eval()

    def with_kernel(self, kernel: str) -> Any:
        if kernel == self.kernel:
            return self.module
        module = self._build(kernel)
        module.load_state_dict(self.weights)
        return module

    def own(self) -> list[Tensor]:
        """Outputs [t, …] of each sequence alone, by the model's own forward pass."""
        return _attempt("its small copy cannot be run", lambda: [self.plain(ids) for ids in self.sequences])

    def plain(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def check_own(self, expected: list[Tensor]) -> None:
        """Check that a token's output depends only on the preceding tokens. Raises `Refusal`."""
        index = LENGTHS.index(max(LENGTHS))
        changed = self.sequences[index].clone()
        changed[-1] = (changed[-1] - 2) % (VOCABULARY - 3) + 3
        if _distance([self.plain(changed)[:-1]], [expected[index][:-1]]) > TOLERANCE:
            raise Refusal("it is bidirectional: its outputs depend on later tokens")
        order = sorted(range(len(LENGTHS)), key=lambda i: LENGTHS[i])
        again = [self.plain(self.sequences[i]) for i in order]
        if _distance(again, [expected[i] for i in order]) > TOLERANCE:
            raise Refusal(
                "its outputs depend on the sequences that it has seen before (a dynamic rotary embedding "
                "beyond max_position_embeddings): keep the run's sequences below that"
            )

    def stream(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.sequences), position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS)

    def pair(self) -> tuple[Tensor, Tensor, Tensor]:
        """A stream of two sequences, of which the second begins like the first, which is the longest."""
        first, second = max(self.sequences, key=len), min(self.sequences, key=len)
        both = [first, torch.cat([first[: len(first) - len(second)], second])]
        lengths = [len(each) for each in both]
        return torch.cat(both), position_ids_of(lengths), cu_seqlens_of(lengths)

    def outputs(
        self, ids: Tensor, positions: Tensor, ends: Tensor, prefixes: SharedPrefixes | None
    ) -> Tensor:
        """Outputs [T, …] of one packed stream."""
        raise NotImplementedError


class _Policy(_Subject):
    make = staticmethod(AutoModelForCausalLM.from_config)

    def plain(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the vocabulary, [t, V]."""
        return self.module(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)

    def comparable(self, own: list[Tensor]) -> list[Tensor]:
        """Log-probabilities and entropies of each sequence, [2, t]; 0 for its first token."""
        pairs = zip(own, self.sequences, strict=True)
        return [torch.stack([_of_tokens(each, ids), _entropy(each)]) for each, ids in pairs]

    def outputs(
        self, ids: Tensor, positions: Tensor, ends: Tensor, prefixes: SharedPrefixes | None
    ) -> Tensor:
        policy = PolicyModel(self.with_kernel(VARLEN_SDPA), chunk_tokens=32).eval()
        return policy(ids, positions, ends, torch.ones(len(ids)), prefixes=prefixes).logprobs

    def ours(self, streams: Streams) -> tuple[list[Tensor], int]:
        policy = PolicyModel(self.with_kernel(streams.attention or VARLEN_SDPA), chunk_tokens=32).eval()
        policy.streams = streams
        ids, positions, ends = self.stream()
        with attending_layers() as seen:
            output = policy(ids, positions, ends, torch.ones(len(ids)))
        return list(torch.stack(output).split(LENGTHS, 1)), len(seen)

    def fault_of_its_head(self) -> str | None:
        """The difference, if the logits are an unsupported function of the output projection."""
        projection, seen = self.module.get_output_embeddings(), []
        if not isinstance(projection, nn.Linear):
            return f"its output projection is a {type(projection).__name__}, not a linear layer"
        handle = projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        logits = self.module(input_ids=self.sequences[0][None], use_cache=False).logits[0].float()
        handle.remove()
        projected = (
            seen[-1].reshape_as(logits).float() if seen and seen[-1].numel() == logits.numel() else None
        )
        if projected is None:
            return None
        factor = float((logits * projected).sum() / (projected * projected).sum())
        if abs(factor - 1.0) > 1e-3 and torch.allclose(logits, factor * projected, atol=1e-4):
            return f"it multiplies its logits in a way that is not known here (the copy's by {factor:.4g})"
        return None


class _VisionPolicy(_Policy):
    """On text; images are compared in tests/models/test_vision.py."""

    make = staticmethod(AutoModelForImageTextToText.from_config)


class _Decoder(_Subject):
    make = staticmethod(AutoModel.from_config)

    def plain(self, ids: Tensor) -> Tensor:
        """[t, H]."""
        return self.module(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def comparable(self, own: list[Tensor]) -> list[Tensor]:
        return own

    def outputs(
        self, ids: Tensor, positions: Tensor, ends: Tensor, prefixes: SharedPrefixes | None
    ) -> Tensor:
        decoder = self.with_kernel(VARLEN_SDPA)
        hidden, share = PackedModel().decode(decoder, ids, positions, ends, prefixes=prefixes)
        return hidden[share.rows_of(torch.arange(len(ids)))]

    def ours(self, streams: Streams) -> tuple[list[Tensor], int]:
        decoder = self.with_kernel(streams.attention or VARLEN_SDPA)
        with attending_layers() as seen:
            found = hidden_states(decoder, *self.stream(), streams)
        return list(found.split(LENGTHS)), len(seen)

    def fault_of_its_head(self) -> None:
        return None


def _of_tokens(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the given tokens, [t] from [t, V]."""
    return torch.cat([torch.zeros(1), logprobs[:-1].gather(-1, ids[1:, None]).squeeze(-1)])


def _entropy(logprobs: Tensor) -> Tensor:
    """Entropy before each token, [t] from [t, V]."""
    return torch.cat([torch.zeros(1), -(logprobs.exp() * logprobs).sum(-1)[:-1]])


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _attempt(what: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # from transformers' or the checkpoint's code
        raise Refusal(f"{what}: {_message(error)}") from error


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


@contextmanager
def silent() -> Iterator[None]:
    """Silences transformers' warnings, which are about the copy and not a real model."""
    kept = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(kept)


@contextmanager
def whole() -> Iterator[None]:
    """Models are created unpartitioned inside, also in a process that loads others partitioned (ZeRO-3)."""
    reference = zero3._hf_deepspeed_config_weak_ref
    kept = reference() if reference is not None else None
    zero3.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            zero3.set_hf_deepspeed_config(kept)
