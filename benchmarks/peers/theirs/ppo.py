"""A PPO loop with transformers alone, in the manner of DeepSpeed-Chat: the control of jobs/ppo.py, as TRL
has no PPO.

Actor, critic and frozen reference in one process; prompts padded to the left, responses by `generate`; full
logits and a log-softmax over them, padding included; one pass over the batch in micro-batches.
"""

from __future__ import annotations

import json
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from benchmarks.peers.theirs.rewards import variety
from benchmarks.peers.theirs.steps import StepTimes, autocast, parse, use_threads

KL_COEF, GAMMA, LAMBDA, CLIP, VALUE_CLIP = 0.01, 1.0, 0.95, 0.2, 0.2
LR, CRITIC_LR, MAX_GRAD_NORM = 1e-6, 1e-5, 1.0


class Experience(NamedTuple):
    ids: Tensor  # [B, P + R]
    mask: Tensor  # [B, P + R], 0 for padding
    logprobs: Tensor  # [B, R], as are those below
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def main() -> None:
    options = parse(prompts=int, response=int, micro=int, threads=int)
    use_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    actor = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ref = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    critic = AutoModelForTokenClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
        for model, lr in ((actor, LR), (critic, CRITIC_LR))
    ]
    texts = cycle([json.loads(line)["prompt"] for line in Path(options.data).read_text().splitlines()])
    times, parts = StepTimes(), {"time/generate": 0.0, "time/logprobs": 0.0, "time/update": 0.0}
    times.start()
    for step in range(options.steps):
        marks = [time.perf_counter()]
        prompts = tokenizer(list(islice(texts, options.prompts)), return_tensors="pt", padding=True)
        with autocast(options):
            ids, mask = generate(actor, prompts, options.response, tokenizer.pad_token_id)
        rewards = torch.tensor(variety(responses=tokenizer.batch_decode(ids[:, -options.response :])))
        marks.append(time.perf_counter())
        with autocast(options):
            batch = experience(actor, ref, critic, ids, mask, rewards, options.response, options.micro)
        marks.append(time.perf_counter())
        update(actor, critic, optimizers, batch, options)
        marks.append(time.perf_counter())
        if step > 0:
            for name, start, end in zip(parts, marks, marks[1:], strict=False):
                parts[name] += (end - start) / (options.steps - 1)
        times.current = int(mask.sum())
        times.step_done()
    times.answer(options.answer, parts=parts, notes={"response_tokens": float(options.response)})


@torch.no_grad()
def generate(actor: Any, prompts: Any, length: int, pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask, [B, P + R] each; the model has no end of text, so responses have `length` tokens."""
    actor.eval()
    ids = actor.generate(**prompts, max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=pad)
    actor.train()
    return ids, functional.pad(prompts["attention_mask"], (0, length), value=1)


@torch.no_grad()
def experience(
    actor: Any, ref: Any, critic: Any, ids: Tensor, mask: Tensor, rewards: Tensor, length: int, micro: int
) -> Experience:
    chunks = list(zip(ids.split(micro), mask.split(micro), strict=True))
    logprobs, ref_logprobs = (
        torch.cat([response_logprobs(model, *chunk, length) for chunk in chunks]) for model in (actor, ref)
    )
    values = torch.cat([response_values(critic, *chunk, length) for chunk in chunks])
    per_token = -KL_COEF * (logprobs - ref_logprobs)
    per_token[:, -1] += rewards
    advantages, last = torch.zeros_like(values), torch.zeros(len(values))
    for t in reversed(range(length)):
        following = values[:, t + 1] if t + 1 < length else 0.0
        last = per_token[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * last
        advantages[:, t] = last
    returns = advantages + values
    whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return Experience(ids, mask, logprobs, ref_logprobs, values, whitened, returns)


def update(actor: Any, critic: Any, optimizers: list[Any], batch: Experience, options: Any) -> None:
    """One optimizer step of each, over micro-batches."""
    parts = [Experience(*rows) for rows in zip(*(field.split(options.micro) for field in batch), strict=True)]
    length = batch.logprobs.shape[1]
    for part in parts:
        with autocast(options):
            logprobs = response_logprobs(actor, part.ids, part.mask, length)
        ratio = (logprobs - part.logprobs).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(ratio * part.advantages, clipped * part.advantages).mean()
        (loss / len(parts)).backward()
    for part in parts:
        with autocast(options):
            values = response_values(critic, part.ids, part.mask, length)
        near = part.values + (values - part.values).clamp(-VALUE_CLIP, VALUE_CLIP)
        loss = 0.5 * torch.maximum((values - part.returns) ** 2, (near - part.returns) ** 2).mean()
        (loss / len(parts)).backward()
    for model, optimizer in zip((actor, critic), optimizers, strict=True):
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def response_logprobs(model: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """[B, R]"""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logprobs[:, -length:]


def response_values(critic: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """[B, R]: of the state before each response token."""
    values = critic(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False).logits
    return values[:, -length - 1 : -1, 0].float()


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


if __name__ == "__main__":
    main()
