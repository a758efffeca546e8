"""Renders an example in normal form as token sequences with loss masks, truncated as the config says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rayrlhf.config.example_data import ExampleDataConfig, PrmDataConfig, SftDataConfig
from rayrlhf.data.assistant_mask import MaskedConversation, assistant_turns, join, mask_turns
from rayrlhf.data.chat import as_text, decode_prompt, encode_plain
from rayrlhf.data.images import ImageReader, check_not_cut, images_of, num_tokens_of_each, repeated
from rayrlhf.data.markers import cut, encode, markers_of
from rayrlhf.data.rows.conversations import Text
from rayrlhf.data.rows.formats import NormalForm
from rayrlhf.data.rows.messages import Conversation, Message, check_trained
from rayrlhf.data.rows.preferences import Judged, Pair
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.rows.steps import Steps
from rayrlhf.data.template import apply_template
from rayrlhf.samples import EncodedImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedSequence:
    """Precursor of `rayrlhf.batch.TokenSequence`, whose import would need torch."""

    input_ids: list[int]  # [T]
    loss_mask: list[int]  # [T], 0 at position 0
    prompt_tokens: int = 0  # tokens before the last answer
    targets: list[float] = field(default_factory=list)  # [T] if tokens are labelled, else empty
    notes: tuple[str, ...] = ()  # changes made to the row, to be counted

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, stop: int) -> RenderedSequence:
        """Tokens start … stop - 1. The first token of a sequence has no prediction and never a loss."""
        loss_mask = self.loss_mask[start:stop]
        return RenderedSequence(
            self.input_ids[start:stop],
            [0, *loss_mask[1:]],
            max(0, self.prompt_tokens - start),
            self.targets[start:stop],
        )

    def with_images(self, images: Sequence[EncodedImage], reader: ImageReader) -> RenderedSequence:
        """Each placeholder becomes the tokens of its image. They and the markers around never have a loss."""
        repeats = num_tokens_of_each(self.input_ids, images, reader.image_token_id)
        input_ids = repeated(self.input_ids, repeats)
        loss_mask = repeated(self.loss_mask, repeats)
        return replace(
            self,
            input_ids=input_ids,
            loss_mask=[
                0 if token in reader.never_learned else loss
                for token, loss in zip(input_ids, loss_mask, strict=True)
            ],
            prompt_tokens=sum(repeats[: self.prompt_tokens]),
            targets=repeated(self.targets, repeats) if self.targets else [],
        )


@dataclass(frozen=True)
class RenderedExample:
    """The sequences of an example, truncated to the limit."""

    sequences: list[RenderedSequence]
    num_tokens: int  # of the longest sequence, before truncation
    value: float = 0.0  # see `rayrlhf.batch.Example`
    notes: tuple[str, ...] = ()  # changes made to the row, to be counted
    images: tuple[EncodedImage, ...] = ()  # of every sequence, in the order of their tokens


def render_example(
    example: NormalForm,
    config: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader | None = None,
    folder: str = "",
) -> RenderedExample:
    """The token sequences and loss masks of an example. Sequences over `max_tokens` are truncated only with
    `on_long: truncate_*`.

    A sequence ends with the token that ends its last answer: reward models are scored there. The sequences of
    a pair begin with the same prompt ids. Raises `BadRow` for an example that cannot be rendered, or whose
    answer is truncated completely, and `DataError` for an unsuitable tokenizer or template.

    Args:
        reader: of the model's images; None: it has no vision.
        folder: paths of images are relative to it.
    """
    value = 0.0
    images, left_out = _images(example, reader, folder)
    if isinstance(example, Text):
        sequences = [_all_loss_tokens(_ended(example.text, tokenizer))]
    elif isinstance(example, Conversation):
        assert isinstance(config, SftDataConfig)
        sequences = [_conversation(example, config, tokenizer)]
    elif isinstance(example, Pair):
        answers = [
            _answered(example.prompt, answer, example.tools, config, tokenizer)
            for answer in (example.chosen, example.rejected)
        ]
        sequences, value = [_sequence(answer) for answer in answers], example.margin
    elif isinstance(example, Judged):
        answer = _answered(example.prompt, example.response, example.tools, config, tokenizer)
        sequences, value = [_sequence(answer)], float(example.desirable)
    else:
        assert isinstance(config, PrmDataConfig)
        sequences = [_steps(example, config, tokenizer)]
    notes = tuple(dict.fromkeys(note for sequence in sequences for note in sequence.notes))
    if reader is not None and images:
        sequences = [sequence.with_images(images, reader) for sequence in sequences]
    longest = max(map(len, sequences))
    sequences = _fitted([sequence.part(0, len(sequence)) for sequence in sequences], config)
    if reader is not None and images:
        for sequence in sequences:
            limit = f"data.max_tokens={config.max_tokens}"
            check_not_cut(sequence.input_ids, images, reader.image_token_id, limit)
    if not all(any(sequence.loss_mask) for sequence in sequences):
        raise BadRow("it has no loss token")
    if len(sequences) == 2 and sequences[0].input_ids == sequences[1].input_ids:
        raise BadRow("its answers have the same tokens")
    return RenderedExample(sequences, longest, value, (*notes, *left_out), images)


def _images(
    example: NormalForm, reader: ImageReader | None, folder: str
) -> tuple[tuple[EncodedImage, ...], list[str]]:
    if isinstance(example, Conversation):
        return images_of(example.images, example.messages, reader, folder)
    if isinstance(example, Pair | Judged):
        return images_of(example.images, example.prompt, reader, folder)
    return (), []


def _sequence(answer: MaskedConversation) -> RenderedSequence:
    return RenderedSequence(answer.input_ids, answer.loss_mask, answer.prompt_tokens, notes=answer.notes)


def _conversation(
    conversation: Conversation, config: SftDataConfig, tokenizer: PreTrainedTokenizerBase
) -> RenderedSequence:
    messages, tools = conversation.messages, conversation.tools
    turns = assistant_turns(messages, config.learn)
    if not config.apply_chat_template:
        check_trained(messages[-1], "the answer")
        sequence = _sequence(_answered(messages[:-1], messages[-1], None, config, tokenizer))
    elif config.learn == "all" and messages[-1]["role"] != "assistant":
        messages, tools, notes = as_text(messages, tools, tokenizer)
        text = apply_template(messages, tokenizer, tools=tools, add_generation_prompt=False)
        return _all_loss_tokens(encode(text, tokenizer), notes)
    else:
        sequence = _sequence(mask_turns(messages, turns, tokenizer, tools))
    return _all_loss_tokens(sequence.input_ids, sequence.notes) if config.learn == "all" else sequence


def _all_loss_tokens(ids: list[int], notes: Sequence[str] = ()) -> RenderedSequence:
    # prompt_tokens = all: no part is protected from truncation.
    return RenderedSequence(ids, [1] * len(ids), prompt_tokens=len(ids), notes=tuple(notes))


def _answered(
    prompt: Sequence[Message],
    answer: Message,
    tools: list[dict[str, Any]] | None,
    config: ExampleDataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> MaskedConversation:
    """A prompt and its answer; only the answer has a loss."""
    if config.apply_chat_template:
        return mask_turns([*prompt, answer], [len(prompt)], tokenizer, tools)
    if "content" not in answer:
        raise BadRow("its answer has tool calls, which need data.apply_chat_template=true")
    asked = _plain_prompt(prompt, config)
    prompt_ids = encode_plain(asked, tokenizer)
    ids = _ended(asked + answer["content"], tokenizer)
    if ids[: len(prompt_ids)] != prompt_ids:
        joined = join(prompt_ids, answer["content"], ids[:-1], tokenizer)
        ids = joined if joined[-1] == ids[-1] else [*joined, ids[-1]]
    num_answer = len(ids) - len(prompt_ids)
    return MaskedConversation(ids, [0] * len(prompt_ids) + [1] * num_answer, len(prompt_ids))


def _plain_prompt(prompt: Sequence[Message], config: ExampleDataConfig) -> str:
    if len(prompt) != 1 or prompt[0]["role"] != "user":
        raise BadRow(
            f"its prompt has the messages {', '.join(message['role'] for message in prompt)}, but "
            "data.apply_chat_template is false; wanted one text, or data.apply_chat_template=true"
        )
    text = prompt[0]["content"]
    return text if config.input_template is None else config.input_template.replace("{}", text)


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text without a chat template, with a final eos."""
    eos, bare = _eos(tokenizer), text.rstrip()
    ids = encode_plain(bare if bare.endswith(str(tokenizer.eos_token)) else text, tokenizer)
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no eos token, which ends an answer; add one"
        )
    return eos


def _steps(example: Steps, config: PrmDataConfig, tokenizer: PreTrainedTokenizerBase) -> RenderedSequence:
    """The prompt, then each step followed by the step token, which carries its label."""
    marker = step_token_id(config.step_token, tokenizer)
    notes: list[str] = []
    own: Sequence[str] = ()
    if config.apply_chat_template:
        messages, tools, notes = as_text(example.prompt, example.tools, tokenizer)
        own = [token for token in markers_of(tokenizer).own if token != config.step_token]
        text = apply_template(messages, tokenizer, tools=tools, add_generation_prompt=True)
        input_ids = encode(text, tokenizer)
    else:
        input_ids = encode_plain(_plain_prompt(example.prompt, config), tokenizer)
    prompt_tokens = len(input_ids)
    loss_mask, targets = [0] * prompt_tokens, [0.0] * prompt_tokens
    for number, (step, label) in enumerate(zip(example.steps, example.labels, strict=True), start=1):
        step_ids = encode(cut(step, own), tokenizer)
        if marker in step_ids:
            raise BadRow(f"step {number} contains the token of data.step_token={config.step_token!r}")
        input_ids = [*input_ids, *step_ids, marker]
        loss_mask += [*[0] * len(step_ids), int(label is not None)]
        targets += [*[0.0] * len(step_ids), label or 0.0]
    return RenderedSequence(input_ids, loss_mask, prompt_tokens, targets, tuple(notes))


@lru_cache(maxsize=4)
def step_token_id(step_token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `data.step_token`. Raises `DataError` if it is several tokens, or an unknown one."""
    ids = encode(step_token, tokenizer)
    if len(ids) == 1 and decode_prompt(ids, tokenizer) == step_token:
        return ids[0]
    pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
    raise DataError(
        f"data.step_token={step_token!r} is {len(ids)} tokens ({pieces}) to the tokenizer "
        f"{tokenizer.name_or_path}; wanted exactly one known token, such as a reserved special token"
    )


def _fitted(sequences: list[RenderedSequence], config: ExampleDataConfig) -> list[RenderedSequence]:
    """Truncates sequences to `max_tokens`. With truncate_head all lose the same number of prompt tokens."""
    limit = config.max_tokens
    longest = max(map(len, sequences))
    if longest <= limit or config.on_long not in ("truncate_head", "truncate_tail"):
        return sequences
    if config.on_long == "truncate_tail":
        cut = [sequence.part(0, limit) for sequence in sequences]
        if not all(any(sequence.loss_mask) for sequence in cut):
            raise BadRow(f"nothing of its answer is left within data.max_tokens={limit}")
        return cut
    answer = max(len(sequence) - sequence.prompt_tokens for sequence in sequences)
    if answer >= limit:
        raise BadRow(
            f"its answer alone has {answer} tokens, which with one preceding token is more than "
            f"data.max_tokens={limit}; raise it, or set data.on_long=truncate_tail"
        )
    return [sequence.part(longest - limit, len(sequence)) for sequence in sequences]
