"""Renders and tokenises a data row: chat template or plain text, then token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rayrlhf.config.data import DataConfig, PromptDataConfig
from rayrlhf.data.images import ImageReader, images_of, num_tokens_of_each, repeated
from rayrlhf.data.markers import cut, encode, found_in, markers_of
from rayrlhf.data.rows.messages import Message
from rayrlhf.data.rows.prompt_rows import prompt_of
from rayrlhf.data.rows.row import BadRow, DataError, check_text, check_unicode, column_of, quoted, type_name
from rayrlhf.data.template import apply_template, tool_form
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.local import local_folder
from rayrlhf.samples import EncodedImage

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
    except Exception as error:  # a broken or custom tokenizer may raise anything
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


class RenderedPrompt(NamedTuple):
    """The model's input for a row."""

    text: str  # decoded ids, special tokens included
    ids: list[int]
    notes: tuple[str, ...] = ()  # changes made to the row, to be counted
    images: tuple[EncodedImage, ...] = ()  # in the order of their tokens


def render_prompt(
    columns: Mapping[str, Any],
    config: PromptDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader | None = None,
    folder: str = "",
) -> RenderedPrompt:
    """The model's input for a row.

    With `apply_chat_template` a text becomes one user message, `system_prompt` is prepended to a conversation
    without a system message, and the template ends with the generation prompt. Otherwise the text is inserted
    into `input_template`, or used unchanged. Leading special tokens are added by the template or by the
    tokenizer, never by both, and no end-of-sequence token is added: the answer follows. Images become their
    tokens in the ids, and stay placeholders in the text.

    Args:
        reader: of the model's images; None: it has no vision.
        folder: paths of images are relative to it.

    Raises `BadRow` for a row that cannot be rendered and `DataError` for a tokenizer without a chat template.
    """
    found = prompt_of(columns, config)
    if isinstance(found, str):
        text = found if config.input_template is None else config.input_template.replace("{}", found)
        return _prompt(encode_plain(text, tokenizer), config, tokenizer)
    images, left_out = images_of(found.images, found.messages, reader, folder)
    messages, tools, notes = as_text(found.messages, found.tools, tokenizer)
    text = apply_template(messages, tokenizer, tools=tools, add_generation_prompt=True)
    check_unicode(text, f"the conversation in column {config.prompt_key!r}")  # including other keys
    prompt = _prompt(encode(text, tokenizer), config, tokenizer, [*notes, *left_out])
    if reader is None or not images:
        return prompt
    repeats = num_tokens_of_each(prompt.ids, images, reader.image_token_id)
    return prompt._replace(ids=repeated(prompt.ids, repeats), images=images)


def render_text(
    columns: Mapping[str, Any], config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase
) -> RenderedPrompt:
    """A text of `data.ptx`, unchanged; no other column is read."""
    where = f"column {config.prompt_key!r}"
    text = column_of(columns, config.prompt_key, "data.ptx.text_key")
    if not isinstance(text, str):
        raise BadRow(f"{where} holds {type_name(text)}; wanted a text")
    check_text(text, where)
    rendered = _prompt(encode_plain(text, tokenizer), config, tokenizer)
    if len(rendered.ids) < 2:
        raise BadRow(f"{where} is a single token without a preceding one; there are no loss tokens")
    return rendered


def _prompt(
    ids: list[int],
    config: PromptDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[str] = (),
) -> RenderedPrompt:
    if not ids:
        raise BadRow(f"column {config.prompt_key!r} has no token that the tokenizer knows")
    return RenderedPrompt(decode_prompt(ids, tokenizer), ids, tuple(notes))


def as_text(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], list[dict[str, Any]] | None, list[str]]:
    """Messages and tools prepared for the template, and notes on the changes.

    The template's markers in them are plain text (`rayrlhf.data.markers`), an end-of-turn token at the end of
    an answer is removed because the template writes it, and tools are dropped if the template ignores them.
    """
    notes = []
    if tools and tokenizer.chat_template is not None and tool_form(tokenizer) == "nothing":
        tools = None
        notes.append("tools left out, which the chat template does not render")
    markers = markers_of(tokenizer)
    ended = [_without_end(message, markers.closing) for message in messages]
    if ended != list(messages):
        notes.append("an end-of-turn token at the end of an answer left to the chat template")
    if found := found_in([ended, tools], markers.own):
        notes.append(f"special tokens of the chat template taken as text: {quoted(found)}")
    return cut(ended, markers.own), cut(tools, markers.own), notes


def _without_end(message: Message, closing: Sequence[str]) -> Message:
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    while end := next((token for token in closing if content.rstrip().endswith(token)), ""):
        content = content.rstrip().removesuffix(end)
    ended = bool(content.strip()) and content != message["content"]
    return {**message, "content": content} if ended else message


def decode_prompt(prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded text of token ids, special tokens included."""
    text = tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text without a chat template, after the tokenizer's leading special tokens.

    Those that the text already begins with are not duplicated.
    """
    ids, first = encode(text, tokenizer), list(tokens_put_first(tokenizer))
    said = next(n for n in range(len(first), -1, -1) if first[len(first) - n :] == ids[:n])
    return [*first[: len(first) - said], *ids]


@lru_cache(maxsize=8)
def tokens_put_first(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Leading special tokens that the tokenizer adds: Llama's bos, GLM's two tokens, or none."""
    alone = encode("a", tokenizer)
    framed: list[int] = tokenizer("a", verbose=False).input_ids
    starts = range(len(framed) - len(alone) + 1)
    return next((tuple(framed[:n]) for n in starts if framed[n : n + len(alone)] == alone), ())


def single_token(word: str, tokenizer: object) -> int:
    """The id of a word that is a single token. Raises `ValueError` otherwise."""
    ids = tokenizer(word, add_special_tokens=False).input_ids  # pyright: ignore[reportCallIssue]
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; wanted a word that is one token")
    return ids[0]
