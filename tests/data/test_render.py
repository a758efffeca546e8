"""Token ids and loss masks of an example derived by hand.

The tokenizer of tests/tiny_model.py: <pad> 0, <s> 1, </s> 2, <|system|> 3, <|user|> 4, <|assistant|> 5,
<|tool|> 6, <|extra|> 7, and byte b of printable ASCII is b - 25. A newline (byte 10) and a blank (32) are
found by encoding them.
"""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.example_data import KtoDataConfig, PairDataConfig, PrmDataConfig, SftDataConfig
from rayrlhf.data.render import RenderedExample, render_example, step_token_id
from rayrlhf.data.rows.formats import normal_form
from rayrlhf.data.rows.row import BadRow, DataError
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

CHATML = (
    "{% for message in messages %}<|extra|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|extra|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|user|>' + message['role'] + '<|tool|>\n\n' + "
    "message['content'] | trim + '<|extra|>' %}{% if loop.first %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant<|tool|>\n\n' }}{% endif %}"
)
# Drops what earlier answers thought, as Qwen3's does.
FORGETFUL = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in message['content'] %}"
    "{{ message['content'].split('</think>')[1] }}{% else %}{{ message['content'] }}{% endif %}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[I] ' + message['content'] + ' [/I]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
USER, ASSISTANT = 4, 5


def ids(text: str, tokenizer: Any = None) -> list[int]:
    return (tokenizer or make_tokenizer())(text, add_special_tokens=False).input_ids


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def sft(messages: Any, template: str | None = CHAT_TEMPLATE, **fields: Any) -> tuple[list[int], list[int]]:
    config = SftDataConfig.model_validate({"train": "a.jsonl", **fields})
    rendered = render_example(normal_form({"messages": messages}, config), config, make_tokenizer(template))
    [sequence] = rendered.sequences
    assert len(sequence.input_ids) == len(sequence.loss_mask)
    return sequence.input_ids, sequence.loss_mask


def loss_ids(found: tuple[list[int], list[int]]) -> list[int]:
    return [token for token, mask in zip(*found, strict=True) if mask]


def masked(*parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Ids and mask of texts with loss (1) or without (0)."""
    pieces = [(ids(text), mask) for text, mask in parts]
    return [i for piece, _ in pieces for i in piece], [m for piece, m in pieces for _ in piece]


def test_a_prompt_and_an_answer_by_hand() -> None:
    # <s><|user|>hi</s><|assistant|>be</s>: h is 104 - 25, i 80, b 73, e 76
    assert sft(turns("hi", "be")) == ([1, 4, 79, 80, 2, 5, 73, 76, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1])


def test_every_answer_and_nothing_else_is_trained_on_with_chatml() -> None:
    found = sft(turns("hi", "be", "so", "no"), CHATML)
    assert found == masked(
        ("<|extra|>user\nhi</s>\n<|extra|>assistant\n", 0),
        ("be</s>", 1),
        ("\n<|extra|>user\nso</s>\n<|extra|>assistant\n", 0),
        ("no</s>", 1),  # and what the template puts after it is cut
    )


@pytest.mark.parametrize("learn, wanted", [("last_response", [0, 1]), ("responses", [1, 1])])
def test_the_last_answer_alone(learn: str, wanted: list[int]) -> None:
    found = sft(turns("hi", "be", "so", "no"), CHATML, learn=learn)
    assert found == masked(
        ("<|extra|>user\nhi</s>\n<|extra|>assistant\n", 0),
        ("be</s>", wanted[0]),
        ("\n<|extra|>user\nso</s>\n<|extra|>assistant\n", 0),
        ("no</s>", wanted[1]),
    )


def test_all_tokens_but_the_first() -> None:
    input_ids, loss_mask = sft(turns("hi", "be"), learn="all")
    assert (input_ids, loss_mask) == ([1, 4, 79, 80, 2, 5, 73, 76, 2], [0, *[1] * 8])


def test_llama3_ends_its_turns_with_another_token_than_eos() -> None:
    found = sft(turns("hi", " be ", "so", "no"), LLAMA3)
    assert found == masked(
        ("<s><|user|>user<|tool|>\n\nhi<|extra|><|user|>assistant<|tool|>\n\n", 0),
        ("be<|extra|>", 1),
        ("<|user|>user<|tool|>\n\nso<|extra|><|user|>assistant<|tool|>\n\n", 0),
        ("no<|extra|>", 1),
    )


def test_a_template_without_a_generation_prompt() -> None:
    found = sft(turns("hi", "be", "so", "no"), LLAMA2)
    assert found == masked(("<s>[I] hi [/I]", 0), (" be </s>", 1), ("<s>[I] so [/I]", 0), (" no </s>", 1))


def test_generation_tags_agree_with_those_of_transformers() -> None:
    messages = turns("hi", "be", "so", "no")
    wanted: Any = make_tokenizer(TAGGED).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    found = sft(messages, TAGGED)
    assert found == (wanted["input_ids"], wanted["assistant_masks"])
    assert loss_ids(found) == ids("be</s>no</s>")
    assert loss_ids(sft(messages, TAGGED, learn="last_response")) == ids("no</s>")


def test_generation_tags_that_leave_out_the_beginning_or_the_ending_token() -> None:
    template = TAGGED.replace("<|assistant|>{% generation %}", "<|assistant|>x{% generation %}").replace(
        "</s>{% endgeneration %}", "{% endgeneration %}</s>\n"
    )
    assert sft(turns("hi", "be", "so", "no"), template) == masked(
        ("<|user|>hi</s><|assistant|>x", 0),
        ("be</s>", 1),
        ("\n<|user|>so</s><|assistant|>x", 0),
        ("no</s>", 1),
    )


def test_generation_tags_that_include_what_comes_after_the_ending_token() -> None:
    template = TAGGED.replace("</s>{% endgeneration %}", "</s>\n{% endgeneration %}")
    found = sft(turns("hi", "be", "so", "no"), template)
    assert loss_ids(found) == ids("be</s>no</s>")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    thinking = turns("hi", "<think>x</think>be", "so", "<think>y</think>no")
    with pytest.raises(
        DataError, match=r"renders an earlier assistant turn differently .*learn=last_response"
    ):
        sft(thinking, FORGETFUL)
    found = sft(
        thinking, FORGETFUL, learn="last_response"
    )  # the context in training equals that of inference
    assert found == masked(
        ("<|user|>hi</s><|assistant|>be</s><|user|>so</s><|assistant|>", 0), ("<think>y</think>no</s>", 1)
    )
    assert loss_ids(sft(thinking[:2], FORGETFUL)) == ids("<think>x</think>be</s>")
    assert loss_ids(sft(turns("hi", "be", "so", "no"), FORGETFUL)) == ids("be</s>no</s>"), "nothing to forget"


def test_a_template_that_opens_otherwise_than_it_goes_on_is_refused() -> None:
    template = CHATML.replace("<|extra|>assistant\n{% endif %}", "<|extra|>bot\n{% endif %}")
    with pytest.raises(DataError, match="differently from its generation prompt"):
        sft(turns("hi", "be"), template)


def test_a_template_that_never_stops_is_refused() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="does not end the assistant's turn with a special token"):
        sft(turns("hi", "be"), template)


def test_what_follows_the_last_answer_is_cut() -> None:
    assert sft(turns("hi", "be", "so")) == sft(turns("hi", "be"))
    found = sft(turns("hi", "be", "so"), learn="all")
    assert loss_ids(found) == ids("<|user|>hi</s><|assistant|>be</s><|user|>so</s>")


def test_a_weight_of_0_leaves_a_turn_out() -> None:
    messages: list[dict[str, Any]] = turns("hi", "be", "so", "no")
    messages[1]["weight"] = 0
    assert loss_ids(sft(messages)) == ids("no</s>")
    messages[3]["weight"] = 0
    with pytest.raises(BadRow, match="weight 0"):
        sft(messages)


def merging_tokenizer(template: str | None = CHATML) -> Any:
    """With one token more, 264: two newlines in a row."""
    import json

    from tokenizers import Tokenizer

    tokenizer = make_tokenizer(template)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"]["ĊĊ"] = 264
    described["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    assert ids("\n\n", tokenizer) == [264]
    return tokenizer


def test_a_token_across_the_boundary_is_split_where_inference_would_split_it() -> None:
    tokenizer = merging_tokenizer()
    config = SftDataConfig.model_validate({"train": "a.jsonl"})
    example = normal_form({"messages": turns("hi", "\n\nbe")}, config)
    prompt_text, answer = "<|extra|>user\nhi</s>\n<|extra|>assistant\n", "\n\nbe</s>"
    assert 264 in ids(prompt_text + answer, tokenizer), "the prompt's newline and the answer's first are one"
    [sequence] = render_example(example, config, tokenizer).sequences
    prompt_ids, answer_ids = ids(prompt_text, tokenizer), ids(answer, tokenizer)
    assert sequence.input_ids == [*prompt_ids, *answer_ids]
    assert sequence.loss_mask == [0] * len(prompt_ids) + [1] * len(answer_ids)


def test_a_token_across_the_boundary_of_one_turn_of_several_is_refused() -> None:
    config = SftDataConfig.model_validate({"train": "a.jsonl"})
    example = normal_form({"messages": turns("hi", "\n\nbe", "so", "no")}, config)
    with pytest.raises(BadRow, match="a token spans the boundary of a turn"):
        render_example(example, config, merging_tokenizer())


def plain_sft(row: dict[str, Any], **fields: Any) -> tuple[list[int], list[int]]:
    config = SftDataConfig.model_validate({"train": "a.jsonl", "apply_chat_template": False, **fields})
    [sequence] = render_example(normal_form(row, config), config, make_tokenizer(None)).sequences
    return sequence.input_ids, sequence.loss_mask


def test_plain_prompt_and_response_end_with_one_eos() -> None:
    row = {"prompt": "hi", "response": "be"}
    assert plain_sft(row) == ([1, 79, 80, 73, 76, 2], [0, 0, 0, 1, 1, 1])
    assert plain_sft({**row, "response": "be</s>"}) == plain_sft(row), "not twice"
    assert plain_sft(row, input_template="Q{}A") == masked(("<s>QhiA", 0), ("be</s>", 1))
    with pytest.raises(BadRow, match=r"the messages system, user, but data.apply_chat_template is false"):
        plain_sft({**row, "system": "x"})


def test_plain_texts_are_trained_on_whole() -> None:
    assert plain_sft({"text": "hi"}, learn="all") == ([1, 79, 80, 2], [0, 1, 1, 1])


def test_a_reward_is_said_before_the_last_user_message() -> None:
    fields = {"reward_key": "r", "reward_template": "<{}>"}
    config = SftDataConfig.model_validate({"train": "a.jsonl", **fields})
    example = normal_form({"messages": turns("hi", "be", "so", "no"), "r": 0.5}, config)
    [sequence] = render_example(example, config, make_tokenizer()).sequences
    text = "<s><|user|>hi</s><|assistant|>be</s><|user|><0.5>so</s><|assistant|>no</s>"
    assert sequence.input_ids == ids(text)


def pair(row: dict[str, Any], **fields: Any) -> RenderedExample:
    config = PairDataConfig.model_validate({"train": "a.jsonl", **fields})
    return render_example(normal_form(row, config), config, make_tokenizer())


def test_a_pair_shares_its_prompt_ids() -> None:
    rendered = pair({"prompt": "hi", "chosen": "be", "rejected": "c", "score_chosen": 3, "score_rejected": 1})
    chosen, rejected = rendered.sequences
    assert (chosen.input_ids, chosen.loss_mask) == masked(
        ("<s><|user|>hi</s><|assistant|>", 0), ("be</s>", 1)
    )
    assert (rejected.input_ids, rejected.loss_mask) == masked(
        ("<s><|user|>hi</s><|assistant|>", 0), ("c</s>", 1)
    )
    assert (rendered.value, rendered.num_tokens) == (2.0, 9)


LONG = {"prompt": "abcdef", "chosen": "xyz", "rejected": "w"}  # 10 prompt tokens; 14 and 12 in all


@pytest.mark.parametrize("on_long", ["truncate_head", "truncate_tail"])
def test_long_pairs_are_cut_alike(on_long: str) -> None:
    chosen, rejected = (f"<s><|user|>abcdef</s><|assistant|>{answer}</s>" for answer in ("xyz", "w"))
    rendered = pair(LONG, max_tokens=12, on_long=on_long)
    found = [sequence.input_ids for sequence in rendered.sequences]
    assert rendered.num_tokens == 14
    if on_long == "truncate_head":
        assert found == [ids(chosen)[2:], ids(rejected)[2:]], "the prompt of both loses the same tokens"
        assert [sum(sequence.loss_mask) for sequence in rendered.sequences] == [4, 2]
    else:
        assert found == [ids(chosen)[:12], ids(rejected)]
        assert [sum(sequence.loss_mask) for sequence in rendered.sequences] == [2, 2]


def test_what_cutting_leaves_nothing_of() -> None:
    with pytest.raises(BadRow, match=r"its answer alone has 4 tokens, .*data.max_tokens=4"):
        pair(LONG, max_tokens=4, on_long="truncate_head")
    assert pair(LONG, max_tokens=5, on_long="truncate_head").sequences[0].input_ids == ids(
        "<|assistant|>xyz</s>"
    )
    with pytest.raises(BadRow, match=r"nothing of its answer is left within data.max_tokens=10"):
        pair(LONG, max_tokens=10, on_long="truncate_tail")
    with pytest.raises(BadRow, match="have the same tokens"):
        pair({**LONG, "rejected": "xyw"}, max_tokens=12, on_long="truncate_tail")


@pytest.mark.parametrize("on_long", ["fail", "drop"])
def test_what_is_not_to_be_cut_comes_whole(on_long: str) -> None:
    rendered = pair(LONG, max_tokens=12, on_long=on_long)
    assert (len(rendered.sequences[0]), rendered.num_tokens) == (14, 14)


def test_the_first_token_of_a_sequence_never_has_a_loss() -> None:
    found = sft(turns("hi", "be", "so", "no"), max_tokens=9, on_long="truncate_head")
    # … be</s> <|user|>so</s><|assistant|>no</s> has 11 tokens; the last 9 begin with </s>, a loss token
    assert found[0] == ids("</s><|user|>so</s><|assistant|>no</s>")
    assert found[1] == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def steps(row: dict[str, Any], tokenizer: Any = None, **fields: Any) -> RenderedExample:
    config = PrmDataConfig.model_validate({"train": "a.jsonl", "step_token": "<|extra|>", **fields})
    return render_example(normal_form(row, config), config, tokenizer or make_tokenizer())


def test_steps_are_labelled_at_their_step_token() -> None:
    rendered = steps({"prompt": "hi", "steps": ["a", "bc"], "labels": [True, 0.25]})
    [sequence] = rendered.sequences
    assert sequence.input_ids == ids("<s><|user|>hi</s><|assistant|>a<|extra|>bc<|extra|>")
    assert sequence.loss_mask == [0] * 6 + [0, 1, 0, 0, 1]
    assert sequence.targets == [0.0] * 6 + [0.0, 1.0, 0.0, 0.0, 0.25]


def test_steps_without_a_label_are_read_without_loss() -> None:
    row = {"prompt": "hi", "steps": ["a", "b", "c"], "labels": [1, 0, -1]}
    [sequence] = steps(row, label_scale="rating", neutral="ignore").sequences
    assert sequence.loss_mask == [0] * 6 + [0, 1, 0, 0, 0, 1]
    assert sequence.targets == [0.0] * 7 + [1.0, 0, 0, 0, 0]
    [sequence] = steps(row, label_scale="rating", neutral="half").sequences
    assert sequence.targets == [0.0] * 7 + [1.0, 0, 0.5, 0, 0]


def test_a_step_token_must_be_one_token() -> None:
    assert step_token_id("<|extra|>", make_tokenizer()) == 7
    with pytest.raises(DataError, match=r"data.step_token='ab' is 2 tokens \('a', 'b'\)"):
        steps({"prompt": "hi", "steps": ["x"], "labels": [1]}, step_token="ab")


def test_a_judged_answer() -> None:
    config = KtoDataConfig.model_validate({"train": "a.jsonl"})
    example = normal_form({"prompt": "hi", "completion": "be", "label": False}, config)
    rendered = render_example(example, config, make_tokenizer())
    [sequence] = rendered.sequences
    assert (sequence.input_ids, sequence.prompt_tokens) == ([1, 4, 79, 80, 2, 5, 73, 76, 2], 6)
    assert rendered.value == 0.0


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}<|tool|>{{ tools[0]['name'] }}{% endif %}" + CHAT_TEMPLATE
    config = SftDataConfig.model_validate({"train": "a.jsonl"})
    row = {"messages": turns("hi", "be"), "tools": [{"name": "add"}]}
    [sequence] = render_example(normal_form(row, config), config, make_tokenizer(template)).sequences
    assert sequence.input_ids == ids("<|tool|>add<s><|user|>hi</s><|assistant|>be</s>")


def test_a_tokenizer_without_an_eos() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    config = SftDataConfig.model_validate({"train": "a.jsonl", "apply_chat_template": False})
    with pytest.raises(DataError, match="has no eos token"):
        render_example(normal_form({"prompt": "hi", "response": "be"}, config), config, tokenizer)
