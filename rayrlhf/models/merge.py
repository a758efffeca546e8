"""Merges a PEFT adapter into its base: W + scale · B·A for every adapted weight, on the CPU."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rayrlhf.models.adapter_format import ADAPTER_PREFIX, ADAPTER_WEIGHTS, MergeProblem, Plan
from rayrlhf.models.export import with_padding
from rayrlhf.models.generation import exported_config
from rayrlhf.models.modes import honour_umask
from rayrlhf.models.quiet_peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from rayrlhf.models.vision import copy_processor, is_vision_language

CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
HEAD = re.compile(r"\.(score|classifier(\.out_proj)?)\.weight$")
MAX_SHOWN = 3  # names in a message


def merge(plan: Plan) -> str:
    """Write `plan.out`, and return a summary sentence. The weights keep the base's dtype.

    Raises `MergeProblem` unless every weight of the adapter fits the base: peft itself would ignore those
    that do not.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers warns about new heads, whose weights are in the adapter
    tensors = load_file(plan.adapter / ADAPTER_WEIGHTS)
    base = _load_base(plan, tensors)
    adapted = _adapt(plan, base, tensors)
    merged: Any = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    tokenizer = _tokenizer(plan)
    if plan.task != "CAUSAL_LM":
        tokenizer = _padded(tokenizer)
        merged.config.pad_token_id = merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _write(plan, merged, tokenizer)
    size = sum(parameter.numel() for parameter in merged.parameters())
    what = f"{type(merged).__name__}, {size:,} parameters in {str(merged.dtype).removeprefix('torch.')}"
    return f"{plan.out}: {what}, {plan.adapter} merged into {plan.base}"


def _load_base(plan: Plan, tensors: dict[str, Tensor]) -> Any:
    """The base model for the adapter's task. Raises `MergeProblem`."""
    heads = [tensor for name, tensor in tensors.items() if HEAD.search(name)]
    options = {"num_labels": heads[-1].shape[0]} if heads and plan.task != "CAUSAL_LM" else {}
    try:
        model, loading = _class_of(plan).from_pretrained(
            plan.loaded_base, dtype="auto", output_loading_info=True, **options
        )
    except Exception as error:  # a broken or custom checkpoint may raise anything
        raise MergeProblem(f"the base {plan.base} cannot be loaded for {plan.task}: {error}") from error
    absent = sorted(name for name in loading["missing_keys"] if ADAPTER_PREFIX + name not in tensors)
    if absent:
        raise MergeProblem(
            f"neither the base {plan.base} nor the adapter has {_some(absent)}; give the checkpoint that the "
            "adapter was trained on with --base"
        )
    return model


def _class_of(plan: Plan) -> Any:
    sees = plan.task == "CAUSAL_LM" and is_vision_language(AutoConfig.from_pretrained(plan.loaded_base))
    return AutoModelForImageTextToText if sees else CLASSES[plan.task]


def _adapt(plan: Plan, base: Any, tensors: dict[str, Tensor]) -> PeftModel:
    """The base with the adapter's weights. Raises `MergeProblem`."""
    config = PeftConfig.from_pretrained(str(plan.adapter))
    if config.is_prompt_learning:
        raise MergeProblem(
            f"ADAPTER={plan.adapter}: peft_type={config.peft_type} trains prompts; wanted an adapter of "
            "weights, such as LORA"
        )
    config.base_model_name_or_path = plan.loaded_base  # it may have moved
    try:
        adapted: Any = get_peft_model(base, config)
    except ValueError as error:  # its target_modules are not in this architecture
        raise MergeProblem(_misfit(plan, str(error))) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    allowed = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise MergeProblem(_misfit(plan, f"the adapter has nothing for {_some(missing)}"))
    if foreign := sorted(tensors.keys() - allowed.keys()):
        raise MergeProblem(_misfit(plan, f"the base has no place for {_some(foreign)}"))
    for name, tensor in tensors.items():
        if tensor.shape != allowed[name].shape:
            shapes = f"{list(tensor.shape)} in the adapter and {list(allowed[name].shape)} in the base"
            raise MergeProblem(_misfit(plan, f"{name} is {shapes}"))
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def _misfit(plan: Plan, why: str) -> str:
    return (
        f"{plan.adapter} does not fit the base {plan.base}: {why}; give the checkpoint it was trained on "
        "with --base"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, which may have a different chat template, else the base's."""
    own = (plan.adapter / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(str(plan.adapter) if own else plan.loaded_base)


def _padded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    try:
        return with_padding(tokenizer)
    except ValueError as error:
        raise MergeProblem(str(error)) from error


def _write(plan: Plan, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder atomically."""
    partial = plan.out.with_name(f".{plan.out.name}.partial-{os.getpid()}")
    if plan.task == "CAUSAL_LM":
        model.generation_config = exported_config(model.generation_config, tokenizer)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if is_vision_language(model.config):
            copy_processor(plan.loaded_base, partial)
        honour_umask(partial)
        partial.rename(plan.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
