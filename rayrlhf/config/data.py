"""`data`: where prompts come from and how they become tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rayrlhf.config.base import Section


class SourceConfig(Section):
    path: str
    """`type@path` (jsonl, json, csv, parquet, arrow, dataset) or a path whose suffix tells; file, folder or glob."""
    probability: float | None = Field(None, gt=0)
    """Share of this source in the mix; give it for all sources or for none."""


class PromptDataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1)
    """Sources of training prompts; a plain path or a list of paths will do."""
    eval: list[SourceConfig] = []
    """Sources of held-out prompts; none means no evaluation."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string, or a list of {role, content} messages."""
    label_key: str | None = None
    """Column handed to reward functions as `labels`."""
    input_template: str | None = None
    """Text around the prompt, with {} where it goes."""
    apply_chat_template: bool = True
    """Render with the tokenizer's chat template, ready for the assistant's turn."""
    system_prompt: str | None = None
    """System message put before every conversation."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt, in tokens."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with a row that cannot be read: stop and name it, or skip and count it."""
    on_long_prompt: Literal["fail", "drop", "truncate"] = "fail"
    """What to do with a prompt over max_prompt_tokens: stop and name it, drop it, or keep its last tokens."""
    shuffle: bool = True
    """Another order in every epoch, fixed by run.seed."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]

    @field_validator("input_template")
    @classmethod
    def _template_has_a_place(cls, value: str | None) -> str | None:
        if value is not None and "{}" not in value:
            raise ValueError("must contain {} where the prompt goes")
        return value
