"""A Llama of 330 thousand parameters with a byte-level tokenizer, made on the spot: no test downloads."""

from __future__ import annotations

from pathlib import Path

# Renders <s><|user|>…</s><|assistant|>: each turn is closed by </s>, as the model is to close its own.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|extra|>"]


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """One token per byte after 8 special ones: 264 in all. It adds the bos by itself, as Llama's does."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        model_max_length=512,
    )


def make_tiny_model(
    path: str | Path, *, tied: bool = True, seed: int = 0, sequence_classification: bool = False
) -> str:
    """Saves model (float32, safetensors) and tokenizer to the folder `path`, and returns it.

    Head size 32 and a vocabulary of 264, which vLLM takes on CPU too; initial weights wide enough for logits
    that differ. With `sequence_classification` a reward model with one label.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        dtype="float32",
    )
    if sequence_classification:
        config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (
            LlamaForSequenceClassification(config) if sequence_classification else LlamaForCausalLM(config)
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
