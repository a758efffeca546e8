"""A reward model is scored at the token at which it was trained, whatever the policy's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import PairDataConfig
from rayrlhf.config.reward_sources import ModelSource
from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.data.render import render_example
from rayrlhf.data.rows.preferences import Pair
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.reward.items import Failure, RewardError, ScoreItem
from rayrlhf.reward.reading import INPUT_TEMPLATE, READ_AT, PromptFormat, Reading, read_at
from rayrlhf.reward.reward_model import RewardModel
from rayrlhf.reward_server.requests import ModelFacts, TextTokens
from rayrlhf.runtime.preflight import try_rewards
from rayrlhf.samples import Prompt
from tests.tiny_model import make_tiny_model, make_tokenizer

# As ChatML does: a line break after the token that ends a turn.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER = make_tokenizer(TEMPLATE)
LINE_BREAK = TOKENIZER("\n", add_special_tokens=False).input_ids
EOS = TOKENIZER.eos_token_id
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "why?"}]


def data(**changes: Any) -> PromptDataConfig:
    return PromptDataConfig.model_validate({"train": "none.jsonl", **changes})


def trained_on(**changes: Any) -> list[int]:
    """What `jobs/rm.py` shows a reward model of the same conversation; it learns at the last token."""
    config = PairDataConfig.model_validate({"train": "none.jsonl", **changes})
    system = config.system_prompt
    prompt = [*([{"role": "system", "content": system}] if system else []), *QUESTION]
    answers = ({"role": "assistant", "content": text} for text in ("so", "no"))
    pair = Pair(prompt, *answers)  # pyright: ignore[reportArgumentType]
    return render_example(pair, config, TOKENIZER).sequences[0].input_ids


@pytest.mark.parametrize("system", [None, "be brief"])
def test_12_our_own_are_read_where_they_were_trained(system: str | None) -> None:
    expected = trained_on(system_prompt=system)
    assert expected[-1] == EOS
    reading = Reading(TOKENIZER, "answer_end")
    asked = data(system_prompt=system)
    assert reading.of_conversation({"prompt": "why?"}, asked, "so") == expected
    assert reading.of_conversation({"prompt": QUESTION}, asked, "so") == expected
    # The policy's own tokens are the same: with its last one, or cut off before it.
    assert reading.of_tokens(expected, is_chat=True) == expected
    assert reading.of_tokens(expected[:-1], is_chat=True) == expected
    # Behind our server too, as a whole template, as an answer's text, and without its end.
    for text_ids in ([*expected, *LINE_BREAK], expected, expected[:-1]):
        assert reading.of_text_ids(text_ids) == expected


def test_12_others_are_read_at_the_end_of_their_template() -> None:
    whole = [*trained_on(), *LINE_BREAK]
    reading = Reading(TOKENIZER, "template_end")
    assert reading.of_conversation({"prompt": "why?"}, data(), "so") == whole
    assert reading.of_tokens(whole[:-1], is_chat=True) == whole
    assert reading.of_tokens(whole[:-2], is_chat=True) == whole  # cut off
    assert reading.of_text_ids(whole[:-2]) == whole[:-2]  # a server's text is what the client says it is
    plain = TOKENIZER("why?so", add_special_tokens=False).input_ids
    assert reading.of_tokens(plain, is_chat=False) == plain


def test_12_one_of_plain_texts_is_asked_in_them() -> None:
    template = "Q: {}\nA: "
    expected = trained_on(apply_chat_template=False, input_template=template)
    reading = Reading(TOKENIZER, "answer_end", input_template=template)
    assert reading.of_conversation({"prompt": "why?"}, data(), "so") == expected
    assert reading.of_tokens(expected[:-1], is_chat=False) == expected


def test_12_what_a_checkpoint_says_of_itself_and_what_the_config_says() -> None:
    assert read_at("auto", {}) == "template_end"
    assert read_at("auto", {READ_AT: "answer_end"}) == "answer_end"
    assert read_at("template_end", {READ_AT: "answer_end"}) == "template_end"
    with pytest.raises(DataError, match="rayrlhf_read_at='middle'; wanted answer_end or template_end"):
        read_at("auto", {READ_AT: "middle"})


def test_12_a_served_one_is_read_there_too() -> None:
    source = ServedModel(type="model", path="rm", on_long="keep_start")
    facts = ModelFacts(6, is_decoder=True, read_at="answer_end")
    [whole, cut] = TextTokens(source, TOKENIZER, facts).of(["a</s>\n", "abcdefgh"])
    assert whole[-1] == EOS and len(whole) == 3
    assert cut[-1] == EOS and len(cut) == 6


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With the policy's tokens but for one name: another vocabulary."""
    path = Path(make_tiny_model(tmp_path_factory.mktemp("rm"), sequence_classification=True))
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|extra|>", "<|other|>"))
    return str(path)


def item(prompt: Any, response: str = "so") -> ScoreItem:
    return ScoreItem(Prompt(0, [1, 2], "<|user|>markup", {"prompt": prompt}), response, token_ids=[9] * 600)


def without_template(path: str) -> None:
    (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
    config = Path(path) / "tokenizer_config.json"
    assert "chat_template" not in config.read_text()


def test_17d_without_a_template_the_plain_words_are_read(reward_model: str, tiny_model: str) -> None:
    without_template(reward_model)
    source = ModelSource(type="model", path=reward_model)
    model = RewardModel(source, PromptFormat(tiny_model, data()))
    assert not model.same_tokens
    once, again = model.score([item("why?"), item(QUESTION)])
    assert once == pytest.approx(again)
    assert (
        model.reading.of_conversation({"prompt": QUESTION}, data(), "so")
        == model.tokenizer("why?so").input_ids
    )
    [good, bad] = model.score([item("why?"), item([{"role": "system", "content": "x"}, *QUESTION])])
    assert good == pytest.approx(once)
    assert isinstance(bad, Failure) and "no chat template" in bad.reason and bad.final
    assert isinstance(model.score([item([])])[0], Failure)


def test_17d_it_is_reported_before_the_start(reward_model: str, tiny_model: str) -> None:
    without_template(reward_model)
    from rayrlhf.config.reward import RewardConfig

    reward = RewardConfig.model_validate({"sources": [{"type": "model", "path": reward_model}]})

    def tried(prompt: Any, **changes: Any) -> None:
        rows: Any = [Prompt(0, [1], "", {"prompt": prompt})]
        asked = PromptFormat(tiny_model, data(**changes))
        try_rewards({}, reward, None, rows, "", lambda _: None, prompt_format=asked)

    tried("why?")
    with pytest.raises(
        RewardError, match=r"reward.sources.0 \(model\): path=.* no chat template.* Fix: save"
    ):
        tried([{"role": "system", "content": "x"}, *QUESTION])
    with pytest.raises(RewardError, match="messages system, user"):
        tried("why?", system_prompt="be brief")


def test_12_our_exports_say_where(tmp_path: Path) -> None:
    from tests.reward_export import make_reward_export

    export = make_reward_export(tmp_path, **{READ_AT: "answer_end", INPUT_TEMPLATE: "{}"})
    config = AutoConfig.from_pretrained(export).to_dict()
    assert Reading.of(TOKENIZER, "auto", config).at == "answer_end"
    assert config[INPUT_TEMPLATE] == "{}"


def test_17e_a_sample_beyond_a_table_of_positions_is_a_failure(tmp_path: Path, tiny_model: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "num_labels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = BertConfig(vocab_size=264, max_position_embeddings=20, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(None).save_pretrained(tmp_path)
    model = RewardModel(ModelSource(type="model", path=str(tmp_path)), PromptFormat(tiny_model, data()))
    long, short = model.score([item("why?"), ScoreItem(item("why?").prompt, "so", [9] * 20)])
    assert isinstance(long, Failure) and "600 tokens" in long.reason and "20 positions" in long.reason
    assert isinstance(short, float)


def test_messages_that_cannot_be_read_are_the_rows_own() -> None:
    with pytest.raises(BadRow, match="no column 'prompt'"):
        Reading(TOKENIZER, "answer_end").of_conversation({"question": "why?"}, data(), "so")
