"""What would only come to light at the end of a supervised job is an error at its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from rayrlhf.config.supervised import JOBS
from rayrlhf.data.chat import prompt_tokenizer
from rayrlhf.runtime.model_checks import check_adapters, check_models
from rayrlhf.runtime.preflight import InputError
from tests.integration.policy_runs import tiny_run


def config(job: str, model: str, **sections: Any) -> Any:
    tree = {"run": {"name": "x"}, "model": {"path": model}, "data": {"train": "none.jsonl"}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return JOBS[job].model_validate(tree)


def test_reward_words_are_one_token(tiny_model: str) -> None:
    data = {"step_token": "<|extra|>"}
    check_models(config("prm", tiny_model, data=data, algorithm={"reward_tokens": ["-", "+"]}))
    with pytest.raises(InputError, match=r"algorithm.reward_tokens: 'bad' is 3 tokens"):
        check_models(config("prm", tiny_model, data=data, algorithm={"reward_tokens": ["bad", "good"]}))


def test_13_a_teacher_has_the_vocabulary_of_its_student(tiny_model: str, tmp_path: Path) -> None:
    """Tokens are compared; heads may be padded."""
    from transformers import LlamaConfig

    from tests.tiny_model import make_tokenizer

    check_models(config("kd", tiny_model, teacher={"path": tiny_model}))
    teacher = str(tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(teacher)
    make_tokenizer().save_pretrained(teacher)
    check_models(config("kd", tiny_model, teacher={"path": teacher}))
    served = {"path": teacher, "location": "serve", "top_k": 265}
    with pytest.raises(InputError, match=r"teacher.top_k=265: wanted at most 264"):
        check_models(config("kd", tiny_model, teacher=served))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|extra|>", "<|other|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    prompt_tokenizer.cache_clear()
    with pytest.raises(InputError, match=r"teacher.path: .* differ in 2 tokens, such as '<.extra.>'"):
        check_models(config("kd", tiny_model, teacher={"path": teacher}))


def test_a_reward_model_can_pad(tiny_model: str, tmp_path: Path) -> None:
    """With the end of text as the only special token, padded batches would be scored at a wrong token."""
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_model import make_tokenizer

    check_models(config("rm", tiny_model))
    backend = make_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    with pytest.raises(InputError, match=r"model.path: the tokenizer has no special token but '</s>'"):
        check_models(config("rm", str(tmp_path)))


def test_adapters_are_of_layers_that_the_model_has(tmp_path: Path) -> None:
    """Also reported for a critic's checkpoint."""
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    config.save_pretrained(tmp_path / "critic")
    LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2).save_pretrained(
        tmp_path / "actor"
    )
    lora = {"model": {"lora": {"target_modules": ["q_proj"]}}}
    check_adapters(tiny_run(tmp_path, str(tmp_path / "actor"), **lora))
    other = tiny_run(tmp_path, str(tmp_path / "actor"), **lora, critic={"path": str(tmp_path / "critic")})
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: got q_proj, wanted .* c_attn"):
        check_adapters(other)
    quantized = {"model": {"lora": {}, "quantization": "nf4"}}
    check_adapters(tiny_run(tmp_path, str(tmp_path / "actor"), **quantized))
    other = tiny_run(
        tmp_path, str(tmp_path / "actor"), **quantized, critic={"path": str(tmp_path / "critic")}
    )
    with pytest.raises(
        InputError, match=r"model\.quantization: got nf4 for GPT2Model, wanted a model with linear"
    ):
        check_adapters(other)
