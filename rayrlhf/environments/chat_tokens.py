"""Tokenisation of multi-turn episodes: the opening, and the text between two responses of the policy.

Token ids are never re-encoded from text. An episode is the ids of the opening, then for every turn the ids of
the response exactly as the engine returned them and the ids of the observation as the chat template renders
it. That rendering is what the template writes between one answer and the next: a placeholder answer followed
by the observation is rendered, and all text after the placeholder belongs to the observation. (A rendering
without the observation is not a prefix that could be subtracted: templates such as Qwen3's treat the last
answer of a conversation differently from earlier ones.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data import ends
from rayrlhf.data.chat import render_prompt
from rayrlhf.data.markers import cut, encode, markers_of, whole
from rayrlhf.data.rows.row import BadRow, DataError, check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content and other fields the template reads
Observation = str | Message | Sequence[str | Message]


class Turns:
    """Renders openings and observations with one tokenizer's chat template.

    Raises:
        DataError: for a template that does not support multi-turn episodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: PromptDataConfig) -> None:
        self.tokenizer = tokenizer
        # The opening comes from the environment: the data needs no prompt or label column.
        changes = {"prompt_key": "opening", "label_key": None, "system_key": None, "tools_key": None}
        self.data = data.model_copy(update=changes)
        self.end_of_turn_id: int | None = None  # ends an answer in the template
        if data.apply_chat_template:
            self.end_of_turn_id = check_template(tokenizer)

    def opening(self, opening: str | Sequence[Message]) -> tuple[str, list[int]]:
        """Text and token ids of the messages (or text) returned by `reset`. Raises `BadRow`."""
        if isinstance(opening, Sequence) and not isinstance(opening, str):
            opening = list(opening)
        rendered = render_prompt({"opening": opening}, self.data, self.tokenizer)
        prompt, prompt_ids = rendered.text, rendered.ids
        limit = self.data.max_prompt_tokens
        if len(prompt_ids) > limit:
            raise BadRow(f"the opening has {len(prompt_ids)} tokens; data.max_prompt_tokens is {limit}")
        return prompt, prompt_ids

    def between(self, response_ids: Sequence[int], observation: Observation) -> tuple[str, list[int]]:
        """Text and token ids between a response and the next one.

        The text includes the end of the response's turn; the ids include it only if the response did not end
        with that token itself, but for example with a stop string. Raises `BadRow`.
        """
        if not self.data.apply_chat_template:
            if not isinstance(observation, str):
                raise BadRow(
                    f"an observation of type {type(observation).__name__} with "
                    "data.apply_chat_template=false; wanted a text"
                )
            check_unicode(observation, "the observation")
            return observation, encode(observation, self.tokenizer)
        # Template markers in an observation, e.g. one that repeats the policy's output, are plain text.
        messages = cut(as_messages(observation), markers_of(self.tokenizer).own)
        text = behind_answer(self.tokenizer, messages)
        # Encoded as a whole: a tokenizer may treat the first characters of a text differently.
        ids = encode(text, self.tokenizer)
        if self.end_of_turn_id is not None and list(response_ids[-1:]) == [self.end_of_turn_id]:
            ids = ids[ids.index(self.end_of_turn_id) + 1 :]
        return whole(text), ids


def as_messages(observation: Observation) -> list[Message]:
    """The observation as messages; a text becomes a user message. Raises `BadRow`."""
    parts = [observation] if isinstance(observation, str | Mapping) else observation
    if not isinstance(parts, Sequence):
        raise BadRow(
            f"an observation of type {type(observation).__name__}; "
            "wanted a text, a message {role, content}, or a list of them"
        )
    if not parts:
        raise BadRow("an observation without messages; wanted at least one, or done=True")
    return [_as_message(part) for part in parts]


def _as_message(part: str | Mapping[str, Any]) -> Message:
    message = {"role": "user", "content": part} if isinstance(part, str) else part
    if not isinstance(message, Mapping):
        raise BadRow(f"a message of type {type(part).__name__}; wanted a text or {{role, content}}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"a message with role {role!r:.50} and content {content!r:.50}; wanted two texts")
    if role == "assistant":
        raise BadRow("a message of role 'assistant', which is the policy's own; wanted user, tool or system")
    check_unicode(content, f"a message of role {role!r}")
    return dict(message)


def check_template(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None if the template ends it with text.

    Raises:
        DataError: if the template cannot continue a conversation from the tokens of an answer.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.apply_chat_template is true, but the tokenizer {tokenizer.name_or_path} has no template; "
            "name one with data.chat_template, or set data.apply_chat_template=false"
        )
    try:
        closing = ends.behind_answer(tokenizer, [], generation_prompt=False)
        observed = behind_answer(tokenizer, [{"role": "user", "content": "Go on."}])
    except BadRow as error:
        raise DataError(_refusal(str(error))) from error
    if not observed.startswith(closing):
        raise DataError(
            _refusal(f"it ends an answer with {closing!r}, but continues it with {observed[:80]!r}")
        )
    return ends.end_of_turn_id(tokenizer)


def _refusal(reason: str) -> str:
    return (
        f"the chat template cannot be used with rollout.environment: {reason}; wanted one that renders each "
        "answer unchanged and continues after it. Set data.chat_template to such a template"
    )


def behind_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the template writes after an answer that is followed by `messages`, up to the next answer."""
    return ends.behind_answer(tokenizer, messages, generation_prompt=True)
