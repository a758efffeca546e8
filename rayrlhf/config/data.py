"""`data`: where rows come from and how prompts become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrlhf.config.base import Count, PositiveNumber, Problem, Section, Wanted


class SourceConfig(Section):
    path: str = Field(min_length=1)
    """File, folder, glob (`type@path` or by suffix), or hub id: owner/name[/configuration][@revision]."""
    probability: PositiveNumber | None = None
    """Share of this source in the mix (shares need not sum to 1); give it for all sources or for none."""


def _paths_are_sources(value: Any) -> Any:
    items = [value] if isinstance(value, str | dict | SourceConfig) else value
    if not isinstance(items, list):
        return items
    return [{"path": item} if isinstance(item, str) else item for item in items]


Key = Annotated[str, Field(min_length=1)]
Template = Annotated[str, Field(pattern=r"\{\}"), Wanted("a text with {} where the prompt goes")]

Sources = Annotated[
    list[SourceConfig],
    BeforeValidator(_paths_are_sources),
    Wanted("a path, or a list of paths or of {path, probability}"),
]


def _probabilities_for_all_or_none(split: Literal["train", "eval"], data: DataConfig) -> Problem | None:
    sources: list[SourceConfig] = getattr(data, split)
    without = [i for i, source in enumerate(sources) if source.probability is None]
    if len(without) in (0, len(sources)):
        return None
    return Problem(
        split,
        got=f"a probability for {len(sources) - len(without)} of {len(sources)} sources",
        wanted="a probability for all sources or for none",
        fix="add one to " + ", ".join(f"{split}.{i} ({sources[i].path})" for i in without),
    )


def _train_probabilities(data: DataConfig) -> Problem | None:
    return _probabilities_for_all_or_none("train", data)


def _eval_probabilities(data: DataConfig) -> Problem | None:
    return _probabilities_for_all_or_none("eval", data)


def _one_kind_of_template(data: DataConfig) -> Problem | None:
    if data.apply_chat_template and data.input_template is not None:
        return Problem(
            "input_template",
            got=f"{data.input_template!r} with apply_chat_template=true",
            wanted="one of the two: the chat template would leave input_template unused",
            fix="set data.apply_chat_template to false, or remove data.input_template",
        )
    unused = list(_given_for_chat(data))
    if data.apply_chat_template or not unused:
        return None
    return Problem(
        unused[0],
        got=f"{' and '.join(unused)} with apply_chat_template=false",
        wanted="nothing for the chat template when it is off: it would be left unused",
        fix=f"set data.apply_chat_template to true, or remove data.{' and data.'.join(unused)}",
    )


def _given_for_chat(data: DataConfig) -> Iterator[str]:
    if data.system_prompt is not None:
        yield "system_prompt"
    if data.tools is not None:
        yield "tools"
    if data.chat_template is not None:
        yield "chat_template"


class DataConfig(Section):
    """Fields of every `data` section: sources, prompt format, and the handling of bad rows."""

    train: Sources = Field(min_length=1)
    """Sources of the training data; a plain path or a list of paths will do."""
    eval: Sources = Field(default_factory=list)
    """Sources of the held-out data; none means no evaluation."""
    input_template: Template | None = None
    """Template around the prompt, with {} in its place (with apply_chat_template: false)."""
    apply_chat_template: bool = True
    """Render with the tokenizer's chat template, ready for the assistant's turn."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    system_key: Key | None = None
    """Column with a system message; null takes the column system where there is one."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions for the chat template, of every conversation whose row has none."""
    tools_key: Key | None = None
    """Column with tool definitions for the chat template; null takes the column tools where there is one."""
    images_key: Key | None = None
    """Column with the images of a row, or one image; null takes images, or image, where there is one."""
    image_timeout_seconds: PositiveNumber = 30.0
    """Deadline of each image that is given as an http(s) URL."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with a row that cannot be read: stop and name it, or skip and count it."""
    shuffle: bool = True
    """Shuffle in every epoch, in an order fixed by run.seed."""

    checks = (_train_probabilities, _eval_probabilities, _one_kind_of_template)


class PtxDataConfig(Section):
    sources: Sources = Field(min_length=1)
    """Sources of text; a plain path or a list of paths will do."""
    text_key: str = "text"
    """Column with the text, which is trained on as it is."""
    max_tokens: Count = 1024
    """Longest text, in tokens; of a longer one the last tokens are kept."""
    texts_per_step: Count
    """Texts per step, over all workers."""


class PromptDataConfig(DataConfig):
    ptx: PtxDataConfig | None = None
    """Texts for a language-model loss in addition to the policy's (algorithm.ptx_coef); null is none."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string, or a list of {role, content} messages."""
    label_key: str | None = None
    """Column handed to reward functions as `labels`, for example the reference answer."""
    max_prompt_tokens: Count = 1024
    """Longest prompt, in tokens."""
    on_long_prompt: Literal["fail", "drop", "truncate"] = "fail"
    """What to do with a prompt over max_prompt_tokens: stop and name it, drop it, or keep its last tokens."""
