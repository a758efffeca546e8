"""Chat templates with tools, after those of model families, and tokenizers that have them.

Written for these tests: what they have in common with the originals is how they treat turns, tools and calls.
"""

from __future__ import annotations

from functools import cache
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Definitions in a system turn, calls as JSON between tags.
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One call per message, its arguments under "parameters"; tools answer as ipython.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only one call') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{% if loop.first and tools %}Functions: {{ tools | tojson }}\n{% endif %}"
    "{{ m.content | trim }}"
    "{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Control tokens around everything, ids of nine characters, definitions before the first user message.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Arguments must be JSON text already, and a null content announces the calls.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}"
    "{% elif m.content is none %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ c['function']['name'] + '\n' + c['function']['arguments'] }}{% endfor %}{{ eos_token }}"
    "{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
# Earlier reasoning is dropped; <think> is a special token here, as in some tokenizers.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last and "
    "'</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
TOKENIZERS: dict[str, dict[str, Any]] = {
    "chatml": {"special": IM, "eos": "<|im_end|>", "template": CHATML},
    "qwen": {"special": IM, "eos": "<|im_end|>", "template": QWEN},
    "llama3": {
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "template": LLAMA3,
    },
    "mistral": {
        "special": [
            *["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
            *["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        ],
        "bos": "<s>",
        "eos": "</s>",
        "template": MISTRAL,
    },
    "deepseek": {
        "special": ["<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<|tool|>"],
        "bos": "<bos>",
        "eos": "<eos>",
        "template": DEEPSEEK,
    },
    "think": {"special": [*IM, "<think>", "</think>"], "eos": "<|im_end|>", "template": THINK},
    "glm": {
        "special": ["<|endoftext|>", "[gMASK]", "<sop>"],
        "eos": "<|endoftext|>",
        "first": ["[gMASK]", "<sop>"],
    },
    "adds_both": {
        "special": ["<s>", "</s>"],
        "bos": "<s>",
        "eos": "</s>",
        "first": ["<s>"],
        "last": ["</s>"],
    },
}


@cache
def tokenizer_like(name: str) -> Any:
    """One token per byte, after the special ones."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    kind = TOKENIZERS[name]
    vocab = {token: index for index, token in enumerate([*kind["special"], *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in kind["special"]])
    first, last = kind.get("first", []), kind.get("last", [])
    if first or last:
        tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*first, "$A", *last]), special_tokens=[(t, vocab[t]) for t in (*first, *last)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=kind.get("bos"),
        eos_token=kind["eos"],
        pad_token=kind["special"][0],
        chat_template=kind.get("template"),
    )
