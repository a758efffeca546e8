"""Answers of a checkpoint, by transformers' own generation.

vLLM's engine is several times faster once it runs, but takes 12 s to come up on a CPU (transformers: 4 s,
most of it imports), reserves memory for many requests at once, and the project's engine returns finished
answers only. For a single user who reads along the start-up time matters most.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from rayrlhf.commands.chat.conversation import Answer, ChatProblem, Message, Sampling
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.resolve import base_of, folder_of
from rayrlhf.hub.snapshots import ADAPTER_CONFIG
from rayrlhf.models.generation import ending_ids
from rayrlhf.models.load import resolve_dtype

UNFINISHED = "\ufffd"  # decoded from the first bytes of an incomplete character


class Transformer:
    """A causal language model with its tokenizer; a folder with a PEFT adapter is loaded with its base."""

    def __init__(self, name: str, path: str, *, dtype: str, chat_template: str | None) -> None:
        """Raises `ChatProblem` for what cannot be loaded. `chat_template` (Jinja text) replaces its own."""
        self.name = name
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            base = base_of(Path(path)) if Path(path, ADAPTER_CONFIG).is_file() else None
            whole = path if base is None else folder_of(base, f"the base of {path}", say=lambda _: None)
            self.model: Any = AutoModelForCausalLM.from_pretrained(whole, dtype=resolve_dtype(dtype, device))
            if base is not None:
                self.model.load_adapter(path)
            own = Path(path, "tokenizer_config.json").is_file()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path if own else whole)
        except HubError as error:
            raise ChatProblem(str(error)) from error
        except Exception as error:  # what a broken or foreign checkpoint raises is not specified
            raise ChatProblem(f"{path} cannot be loaded: {error}") from error
        self.model.eval().to(device)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @torch.inference_mode()
    def answer(
        self,
        messages: list[Message],
        sampling: Sampling,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Answer:
        started = time.monotonic()
        input_ids = self._encode(messages)  # [1, T]
        stream = _Stream(self.tokenizer, on_text)
        torch.manual_seed(sampling.seed)
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._generation_config(sampling, input_ids.shape[1]),
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([_Stop(is_stopped)]),
        )
        seconds = time.monotonic() - started
        return Answer(stream.shown, len(stream.token_ids), seconds, interrupted=is_stopped())

    def _encode(self, messages: list[Message]) -> torch.Tensor:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template is foreign code
            raise ChatProblem(
                f"the chat template of {self.name} rejects the conversation: {error}"
            ) from error
        return encoded["input_ids"].to(self.model.device)

    def _generation_config(self, sampling: Sampling, num_prompt_tokens: int) -> Any:
        """The checkpoint's own config with the user's sampling. Raises `ChatProblem` if nothing fits."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = sampling.max_new_tokens if positions is None else positions - num_prompt_tokens
        if room < 1:
            raise ChatProblem(
                f"the conversation has {num_prompt_tokens} tokens, {self.name} reads {positions}: /reset"
            )
        config = copy.deepcopy(self.model.generation_config)
        ends = ending_ids(config, self.tokenizer)
        config.eos_token_id = ends
        config.pad_token_id = self.tokenizer.pad_token_id
        if config.pad_token_id is None and ends:
            config.pad_token_id = ends[0]
        config.max_length = None
        config.max_new_tokens = min(sampling.max_new_tokens, room)
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature or None
        config.top_p = sampling.top_p if config.do_sample else None
        config.top_k = sampling.top_k if config.do_sample else None
        return config


class _Stream(BaseStreamer):
    """Passes on text token by token, whole characters only."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.is_prompt = True  # the first `put`
        self.token_ids: list[int] = []
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.token_ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(
            self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


class _Stop(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.is_stopped(), device=input_ids.device)


def load_speakers(
    tuned: str,
    base: str | None,
    *,
    dtype: str,
    chat_template: str | None,
    name: str | None = None,
) -> list[Transformer]:
    """The base, if any, then the tuned model. A base without a chat template uses that of the tuned one.

    Raises `ChatProblem`.
    """
    name = "tuned" if base else name or Path(tuned).name
    model = Transformer(name, tuned, dtype=dtype, chat_template=chat_template)
    if model.chat_template is None:
        raise ChatProblem(f"{tuned} has no chat template; give one with --chat-template FILE")
    if base is None:
        return [model]
    other = Transformer("base", base, dtype=dtype, chat_template=chat_template)
    if other.chat_template is None:
        other.tokenizer.chat_template = model.chat_template
    return [other, model]
