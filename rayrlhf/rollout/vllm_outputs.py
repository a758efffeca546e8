"""Outputs of vLLM's engine with no more Python objects per token than are read.

The engine's thread makes them, which also schedules and launches the next step: what they cost is time in
which no token is computed, once hundreds of sequences run. benchmarks/engine_outputs.py: 31 -> 7 us per
token.
"""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.v1.engine.logprobs import LogprobsProcessor


def flat(params: dict[str, Any]) -> SamplingParams:
    """The sampling parameters with log-probabilities in lists of numbers, instead of a dict of objects per
    token.
    """
    return SamplingParams(**params, flat_logprobs=params.get("logprobs") is not None)


def leave_out_token_texts() -> None:
    """Log-probabilities come without the text of each token, for which vLLM decodes every token alone, in
    addition to the response as a whole. For all engines of this process.
    """
    make = LogprobsProcessor.from_new_request.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def from_new_request(cls: type[LogprobsProcessor], tokenizer: Any, request: Any) -> LogprobsProcessor:
        return make(cls, tokenizer=None, request=request)

    if make.__module__ != __name__:
        LogprobsProcessor.from_new_request = classmethod(from_new_request)  # pyright: ignore[reportAttributeAccessIssue]
