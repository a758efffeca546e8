import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template, render_prompt
from rayrlhf.data.rows import BadRow, DataError
from tests.tiny_model import make_tokenizer

BOS, EOS, USER, SYSTEM, ASSISTANT = 1, 2, 4, 3, 5  # places in tests.tiny_model.SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def config(**options):
    return PromptDataConfig.model_validate({"train": "unused.jsonl", **options})


def chars(tokenizer, text):
    """Ids of plain ASCII text, looked up one by one; a space is Ġ in a byte-level vocabulary."""
    return tokenizer.convert_tokens_to_ids(["Ġ" if char == " " else char for char in text])


def test_a_text_becomes_a_user_message(tokenizer):
    text, ids = render_prompt({"prompt": "a b"}, config(), tokenizer)
    assert text == "<s><|user|>a b</s><|assistant|>"
    assert ids == [BOS, USER, *chars(tokenizer, "a b"), EOS, ASSISTANT]


def test_messages_are_rendered_in_order(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text, _ = render_prompt({"chat": messages}, config(prompt_key="chat"), tokenizer)
    assert text == "<s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"


def test_the_system_prompt_goes_first_unless_the_row_has_its_own(tokenizer):
    with_system = config(system_prompt="be brief")
    text, ids = render_prompt({"prompt": "a"}, with_system, tokenizer)
    assert text == "<s><|system|>be brief</s><|user|>a</s><|assistant|>"
    assert ids[:2] == [BOS, SYSTEM]
    own = [{"role": "system", "content": "rhyme"}, {"role": "user", "content": "a"}]
    text, _ = render_prompt({"prompt": own}, with_system, tokenizer)
    assert text == "<s><|system|>rhyme</s><|user|>a</s><|assistant|>"


def test_plain_text_gets_the_bos_that_the_tokenizer_adds_and_no_eos(tokenizer):
    text, ids = render_prompt({"prompt": "ab"}, config(apply_chat_template=False), tokenizer)
    assert text == "<s>ab"
    assert ids == [BOS, *chars(tokenizer, "ab")]


def test_a_bos_in_the_input_template_is_not_doubled(tokenizer):
    options = {"apply_chat_template": False, "input_template": "<s>Q: {} {json: 1}\nA:"}
    text, ids = render_prompt({"prompt": "a{b}"}, config(**options), tokenizer)
    assert text == "<s>Q: a{b} {json: 1}\nA:"  # other braces, in the template or the prompt, are left alone
    assert ids.count(BOS) == 1


def test_other_text_than_ascii_survives(tokenizer):
    text, ids = render_prompt({"prompt": "é日\n"}, config(apply_chat_template=False), tokenizer)
    assert text == "<s>é日\n"
    assert len(ids) == 1 + len("é日\n".encode())


def test_messages_need_the_chat_template(tokenizer):
    row = {"prompt": [{"role": "user", "content": "a"}]}
    with pytest.raises(BadRow, match=r"holds messages, but data.apply_chat_template is false"):
        render_prompt(row, config(apply_chat_template=False), tokenizer)


def test_a_tokenizer_without_a_template():
    with pytest.raises(DataError, match=r"has no template; name one with data.chat_template, or set"):
        render_prompt({"prompt": "a"}, config(), make_tokenizer(chat_template=None))


def test_what_a_template_rejects_is_a_bad_row():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRow, match=r"the chat template rejects it: roles must alternate"):
        render_prompt({"prompt": "a"}, config(), tokenizer)


def test_text_without_a_known_token_is_a_bad_row():
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    only_a = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(BadRow, match=r"no token that the tokenizer knows"):
        render_prompt({"prompt": "zzz"}, config(apply_chat_template=False), only_a)


def test_the_chat_template_of_the_config_replaces_the_tokenizers(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "shout.jinja").write_text("{{ messages[0]['content'] | upper }}!")
    with_template = config(chat_template=str(tmp_path / "shout.jinja"))
    tokenizer = prompt_tokenizer(str(tmp_path), chat_template=read_chat_template(with_template))
    assert render_prompt({"prompt": "hey"}, with_template, tokenizer)[0] == "HEY!"
    assert prompt_tokenizer(str(tmp_path)).chat_template != tokenizer.chat_template
    assert read_chat_template(config()) is None


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .*nothing"):
        prompt_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"data.chat_template=.*gone.jinja cannot be read"):
        read_chat_template(config(chat_template=str(tmp_path / "gone.jinja")))
