"""Token ids that a reward model reads of a sample. Its score is read at the last one: the token at which the
model was trained.

Reward models of `jobs/rm.py` are trained and evaluated at the token that ends the answer (`data.render`);
most others at the end of the text that their chat template renders, which in ChatML is a line break later.
The same function is used for reward models of a run and for those behind `jobs/serve_reward.py`, whatever the
policy's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.assistant_mask import ending_tokens, mask_turns
from rayrlhf.data.chat import as_text, encode_plain
from rayrlhf.data.markers import encode
from rayrlhf.data.rows.messages import Conversation, Message
from rayrlhf.data.rows.prompt_rows import prompt_of
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.template import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_AT = "rayrlhf_read_at"  # key in the config.json of our exports
INPUT_TEMPLATE = "rayrlhf_input_template"  # the same, if trained without chat template
ReadAt = Literal["answer_end", "template_end"]
DUMMY: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of the policy whose samples are scored are tokenised and rendered."""

    tokenizer_path: str
    data: PromptDataConfig
    trust_remote_code: bool = False


def read_at(wanted: str, config: Mapping[str, Any]) -> ReadAt:
    """The token to read at, from a source's `read_at` and the checkpoint's config.json."""
    found = config.get(READ_AT, "template_end") if wanted == "auto" else wanted
    if found not in ("answer_end", "template_end"):
        raise DataError(f"its config.json has {READ_AT}={found!r}; wanted answer_end or template_end")
    return found  # pyright: ignore[reportReturnType]


class Reading:
    """Converts samples and texts to token ids such that the score is read at the last one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, at: ReadAt, *, input_template: str | None = None
    ) -> None:
        """`input_template`: for a reward model that was trained without chat template, else None."""
        self.tokenizer = tokenizer
        self.at = at
        self.is_plain = input_template is not None or tokenizer.chat_template is None
        self.input_template = input_template or "{}"
        self.endings = ending_tokens(tokenizer)
        self.ending, self.tail = self._closing()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, wanted: str, config: Mapping[str, Any]) -> Reading:
        return cls(tokenizer, read_at(wanted, config), input_template=config.get(INPUT_TEMPLATE))

    def _closing(self) -> tuple[list[int], list[int]]:
        """The token that ends an answer, and the tokens that the template writes after it."""
        if self.is_plain:
            eos = self.tokenizer.eos_token_id
            return [eos] if isinstance(eos, int) else [], []
        try:
            answered = mask_turns(DUMMY, [1], self.tokenizer).input_ids
        except (BadRow, DataError):
            return [], []  # the template ends turns with plain text, or rejects such a conversation
        whole = encode(apply_template(DUMMY, self.tokenizer, add_generation_prompt=False), self.tokenizer)
        return answered[-1:], whole[len(answered) :]

    def of_tokens(self, token_ids: Sequence[int], *, is_chat: bool) -> list[int]:
        """Ids for a sample in this vocabulary. A truncated answer gets an end token, as all have in training.
        `is_chat`: the sample was rendered with a chat template.
        """
        ids = [*token_ids]
        if self.at == "template_end" and (self.is_plain or not is_chat):
            return ids
        if ids[-1:] and ids[-1] not in self.endings:
            ids += self.ending
        return [*ids, *self.tail] if self.at == "template_end" else ids

    def of_text_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Ids for a text that contains its special tokens."""
        ids = [*token_ids]
        if self.at == "template_end":
            return ids
        if self.tail and ids[-len(self.tail) :] == self.tail:
            ids = ids[: -len(self.tail)]
        return self.of_tokens(ids, is_chat=not self.is_plain)

    def of_conversation(self, columns: Mapping[str, Any], data: PromptDataConfig, response: str) -> list[int]:
        """Ids for a data row and its response, rendered with this tokenizer. Raises `BadRow`."""
        prompt = prompt_of(columns, data)
        question = (
            prompt
            if isinstance(prompt, Conversation)
            else Conversation([{"role": "user", "content": prompt}])
        )
        if self.is_plain:
            return self._plain(question.messages, response)
        messages: list[Message] = [*question.messages, {"role": "assistant", "content": response}]
        if self.at == "answer_end":
            turn = len(messages) - 1
            return mask_turns(messages, [turn], self.tokenizer, question.tools).input_ids
        messages, tools, _ = as_text(messages, question.tools, self.tokenizer)
        text = apply_template(messages, self.tokenizer, tools=tools, add_generation_prompt=False)
        return encode(text, self.tokenizer)

    def _plain(self, messages: Sequence[Mapping[str, Any]], response: str) -> list[int]:
        """The user message, then the answer: a model without template knows no other roles."""
        roles = [message["role"] for message in messages]
        if roles != ["user"]:
            raise BadRow(
                f"the reward model has no chat template, and the prompt has the messages {', '.join(roles)}; "
                "wanted one text. Fix: save the template that it was trained with in its folder "
                "(chat_template.jinja), or use another reward model"
            )
        text = self.input_template.replace("{}", messages[0]["content"]) + response
        if self.at == "template_end":
            return self.tokenizer(text)["input_ids"]  # pyright: ignore[reportReturnType]
        return self.of_tokens(encode_plain(text, self.tokenizer), is_chat=False)
