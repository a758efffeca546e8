"""The control: a plain transformers loop over packed blocks (forward, loss, backward, clip, AdamW).

Blocks are full to the last token and attention is causal over the whole block: no data pipeline, no masks
between sequences, nothing computed for metrics. What a trainer costs is its distance from this.
"""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.theirs.steps import StepTimes, autocast, parse, use_threads


def main() -> None:
    options = parse(accumulate=int, length=int, threads=int)
    use_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    blocks = packed_blocks(options.model, options.data, options.length)
    times = StepTimes()
    times.start()
    for _ in range(options.steps):
        total = 0.0
        for block in islice(blocks, options.accumulate):
            with autocast(options):
                loss = model(input_ids=block, labels=block, use_cache=False).loss / options.accumulate
            loss.backward()
            total += float(loss.detach())
            times.current += block.numel()
        times.losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.step_done()
    times.answer(options.answer)


def packed_blocks(model: str, data: str, length: int):
    """[1, length] each, of all conversations one after the other, again and again."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    tokens = chain.from_iterable(
        tokenizer.apply_chat_template(messages, return_dict=False) for _ in iter(int, 1) for messages in rows
    )
    while True:
        yield torch.tensor([list(islice(tokens, length))])


if __name__ == "__main__":
    main()
