"""From a row of the data to what the model reads: chat template or plain text, then token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.config.data import DataConfig, PromptDataConfig
from rayrlhf.data.rows import BadRow, DataError, check_unicode, prompt_of
from rayrlhf.hub.errors import HubError
from rayrlhf.hub.local import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=4)
def prompt_tokenizer(
    path: str, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, loaded once per process; `chat_template` (Jinja text) replaces its own."""
    from transformers import AutoTokenizer

    try:
        folder = local_folder(path, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except HubError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # what a broken or foreign tokenizer raises is not specified
        raise DataError(f"no tokenizer can be loaded from {path}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def read_chat_template(config: DataConfig) -> str | None:
    """The text of `data.chat_template`. Raises `DataError` where it cannot be read."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={config.chat_template} cannot be read: {error}") from error


def render_prompt(
    columns: Mapping[str, Any], config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[int]]:
    """What the model is given for a row: the text that the ids decode to (special tokens included), the ids.

    With `apply_chat_template` a text becomes one user message, `system_prompt` goes before a conversation
    that has no system message of its own, and the template ends with the opening of the assistant's turn.
    Otherwise the text goes into `input_template`, or stands as it is. A beginning-of-sequence token comes
    from the template or from the tokenizer, never from both, and no end-of-sequence token is ever added: the
    answer is still to come.

    Raises `BadRow` for a row that cannot be rendered and `DataError` for a tokenizer without a chat template.
    """
    prompt = prompt_of(columns, config.prompt_key, config.label_key)
    if config.apply_chat_template:
        text = _render_chat(prompt, config, tokenizer)
        check_unicode(text, f"the conversation in column {config.prompt_key!r}")  # roles and other keys too
        prompt_ids = encode(text, tokenizer)
    elif isinstance(prompt, str):
        text = prompt if config.input_template is None else config.input_template.replace("{}", prompt)
        prompt_ids = encode_plain(text, tokenizer)
    else:
        raise BadRow(
            f"column {config.prompt_key!r} holds messages, but data.apply_chat_template is false; "
            "wanted a text, or data.apply_chat_template=true"
        )
    if not prompt_ids:
        raise BadRow(f"column {config.prompt_key!r} has no token that the tokenizer knows")
    return decode_prompt(prompt_ids, tokenizer), prompt_ids


def decode_prompt(prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of token ids as the model sees it, special tokens included."""
    text = tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _render_chat(
    prompt: str | list[dict[str, Any]], config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase
) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return apply_template(messages, tokenizer, add_generation_prompt=True)


def apply_template(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text of a conversation, ready for the assistant's turn with `add_generation_prompt`.

    Raises `BadRow` where the template rejects the conversation and `DataError` where there is no template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.apply_chat_template is true, but the tokenizer {tokenizer.name_or_path} has no template; "
            "name one with data.chat_template, or set data.apply_chat_template=false"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is foreign code, and its `raise_exception` means this row
        raise BadRow(f"the chat template rejects it: {error}") from error
    assert isinstance(text, str)
    return text


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text that says its special tokens itself."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text without a chat template, after the beginning-of-sequence token the tokenizer adds."""
    ids = encode(text, tokenizer)
    first = _bos_added(tokenizer)
    return ids if ids[:1] == first else [*first, *ids]


def _bos_added(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, in a list that is empty where the tokenizer adds none."""
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("").input_ids[:1] == [bos] else []
