"""Peak memory of one policy update, beside the same update over whole logits.

    .venv/bin/python -m benchmarks.update_memory

One update of `Learner` (forward, policy loss, backward, AdamW) on 4,096 packed tokens with a vocabulary of
49,152, in fp32 on the CPU, ZeRO-0, with gradient checkpointing. The decoder is small on purpose: what is
measured is the head. Three paths, each in a process of its own:

  fused           rayrlhf's head; the loss needs log-probabilities only
  fused + bonus   the same with an entropy bonus, whose gradient takes a second block of logits
  whole logits    log-softmax over all [4096, 49152] logits in the same learner with the same loss, as plain
                  transformers code does it; without the entropy, which would cost it more

The peak counts every allocation of torch's CPU allocator during the second update (the first one makes the
optimizer's moments), from the events of torch.profiler, on top of the tensors alive before it. The
cross-check is the kernel's high-water mark of resident memory (VmHWM) over a third update, without profiler,
with MALLOC_MMAP_THRESHOLD_=262144: by default glibc keeps freed blocks of up to 32 MB. Then come updates for
the speed.

The line to hold: the peak stays below the model's state (weights, gradients, moments) plus 15 % of what one
[4096, 49152] tensor takes in fp32. The exit status is 1 where rayrlhf's head misses it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rayrlhf.batch import PolicyBatch, cu_seqlens_of, position_ids_of
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.attention import VARLEN_SDPA, packed_inputs
from rayrlhf.models.load import checkpoint_activations
from rayrlhf.models.logprobs import PolicyModel, TokenLogprobs
from rayrlhf.policy.losses import PolicyObjective, loss_counts, policy_forward
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Learner, Term

LENGTHS = [256] * 16
NUM_TOKENS = sum(LENGTHS)
VOCABULARY = 49_152
FULL_LOGITS_BYTES = 4 * NUM_TOKENS * VOCABULARY
ALLOWED_SHARE = 0.15
NUM_TIMED_UPDATES = 2
PATHS = ("fused", "fused + bonus", "whole logits")
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "MALLOC_MMAP_THRESHOLD_": "262144"}
RESULTS = Path(__file__).parent / "results"
HEAD = "head of the model"  # where the profiler sees the head begin
MB = 1e6


class WholeLogits(nn.Module):
    """The policy with logits of all tokens, log-softmax and gather."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.head: Any = causal_lm.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        loss_mask: Tensor,
        temperature: float,
    ) -> TokenLogprobs:
        logits: Any = self.causal_lm(**packed_inputs(input_ids, position_ids, cu_seqlens)).logits
        log_probs = logits[0, :-1].float().log_softmax(-1)  # [T-1, V]
        logprobs = log_probs.gather(-1, input_ids[1:, None]).squeeze(-1)
        return TokenLogprobs(nn.functional.pad(logprobs, (1, 0)) * loss_mask, torch.zeros_like(loss_mask))


def make_learner(path: str, chunk_tokens: int) -> Learner:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_SDPA)
    checkpoint_activations(causal_lm)
    whole = path == "whole logits"
    module = WholeLogits(causal_lm) if whole else PolicyModel(causal_lm, chunk_tokens=chunk_tokens)
    module.head.register_forward_pre_hook(_mark_head)
    train = TrainConfig(num_steps=10, zero_stage=0)
    return Learner(module.train(), train, lr=1e-5, dtype=torch.float32, name="actor")


def _mark_head(*_: Any) -> None:
    with record_function(HEAD):
        pass


def make_term(path: str) -> Term:
    """Every token but each sequence's first is a loss token: the most that a head can be asked for."""
    position_ids = position_ids_of(LENGTHS)
    batch = PolicyBatch(
        input_ids=torch.randint(VOCABULARY, (NUM_TOKENS,)),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens_of(LENGTHS),
        loss_mask=(position_ids > 0).float(),
        scores=torch.zeros(len(LENGTHS)),
        group_ids=torch.arange(len(LENGTHS)),
        group_advantages=torch.zeros(len(LENGTHS)),
        rollout_logprobs=torch.zeros(NUM_TOKENS),
        advantages=torch.randn(NUM_TOKENS),
    )
    algorithm = AlgorithmConfig(entropy_coef=0.01 if path == "fused + bonus" else 0.0)
    loss = PolicyObjective(algorithm, loss_counts([batch], Ranks()), kl_coef=0.0, constant_length=256.0)
    return Term([batch], policy_forward(0.9), loss)


def state_bytes(learner: Learner) -> int:
    """Weights, gradients and both moments, counted from the parameters (fp32)."""
    return sum(4 * 4 * p.numel() for p in learner.module.parameters())


def live_bytes() -> int:
    """Of every tensor that Python can reach; a storage that several share counts once."""
    gc.collect()
    # Of its type, since asking an object for its class may wake a lazy module.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocations(learner: Learner, term: Term) -> dict[str, int]:
    """Bytes alive at the peak of an update, and what the decoder keeps alive when the head first begins."""
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.update(term, step=1)
    alive, peak, at_head = 0, 0, 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: Any = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == HEAD:
            at_head = at_head or alive  # the first time: no gradients are alive beside it
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return {"before": before, "peak": before + peak, "decoder": at_head}


def resident(learner: Learner, term: Term) -> dict[str, int]:
    """Resident bytes before an update and at its high-water mark."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc(5)
    before = _status("VmRSS")
    learner.update(term, step=2)
    return {"rss_before": before, "rss_peak": _status("VmHWM")}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(path: str, chunk_tokens: int) -> dict[str, Any]:
    """One path, in this process."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        learner, term = make_learner(path, chunk_tokens), make_term(path)
        learner.update(term, step=0)
        numbers: dict[str, Any] = {"path": path, "state": state_bytes(learner)}
        numbers |= allocations(learner, term) | resident(learner, term)
        start = time.perf_counter()
        for step in range(NUM_TIMED_UPDATES):
            learner.update(term, step=3 + step)
        seconds = (time.perf_counter() - start) / NUM_TIMED_UPDATES
        dist.destroy_process_group()
    numbers["over_state"] = numbers["peak"] - numbers["state"]
    numbers["share_of_full_logits"] = numbers["over_state"] / FULL_LOGITS_BYTES
    return numbers | {"tokens_per_second": NUM_TOKENS / seconds}


def in_a_process_of_its_own(path: str, chunk_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "numbers.json"
        arguments = ["--path", path, "--chunk-tokens", str(chunk_tokens), "--answer", str(answer)]
        environment = os.environ | ENVIRONMENT
        subprocess.run(
            [sys.executable, "-m", "benchmarks.update_memory", *arguments], env=environment, check=True
        )
        return json.loads(answer.read_text())


def machine(chunk_tokens: int) -> dict[str, Any]:
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    )
    packages = ("torch", "transformers", "deepspeed")
    return {
        "cpu": cpu.split(":")[1].strip(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in packages},
        "load_average": round(os.getloadavg()[1], 1),  # over five minutes: what else the cores were doing
        "command": f".venv/bin/python -m benchmarks.update_memory --chunk-tokens {chunk_tokens}",
    }


def as_markdown(rows: list[dict[str, Any]], where: dict[str, Any], chunk_tokens: int, verdict: str) -> str:
    table = [
        "| path | state MB | peak MB | peak over state MB | of the full tensor | decoder's part MB "
        "| RSS before → peak MB | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r['path']} | {r['state'] / MB:.1f} | {r['peak'] / MB:.1f} | {r['over_state'] / MB:.1f} "
            f"| {r['share_of_full_logits']:.1%} | {r['decoder'] / MB:.1f} "
            f"| {r['rss_before'] / MB:.0f} → {r['rss_peak'] / MB:.0f} | {r['tokens_per_second']:.0f} |"
            for r in rows
        ),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return "\n".join(
        [
            "# Peak memory of one policy update",
            "",
            f"{NUM_TOKENS:,} packed tokens, vocabulary {VOCABULARY:,}, fp32, hidden 256, 2 layers, tied, "
            f"gradient checkpointing; chunks of {chunk_tokens} rows. One [{NUM_TOKENS}, {VOCABULARY}] fp32 "
            f"tensor takes {FULL_LOGITS_BYTES / MB:.1f} MB.",
            "",
            *table,
            "",
            f"{verdict}",
            "",
            "State: weights, gradients and AdamW's two moments. Decoder's part: what the decoder keeps alive "
            "when the head begins. How it is measured stands in `benchmarks/update_memory.py`.",
            "",
            f"{where['cpu']}, {where['cores']} cores, load average {where['load_average']} (tokens/s suffer "
            f"from what else runs, bytes do not); {versions}. `{where['command']}`",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory of one policy update.")
    parser.add_argument("--chunk-tokens", type=int, default=TrainConfig(num_steps=1).logprob_chunk_tokens)
    parser.add_argument("--path", choices=PATHS, help="measure this one in this process")
    parser.add_argument("--answer", type=Path, help="where --path writes its numbers")
    options = parser.parse_args()
    if options.path:
        options.answer.write_text(json.dumps(measure(options.path, options.chunk_tokens)))
        return 0
    rows = [in_a_process_of_its_own(path, options.chunk_tokens) for path in PATHS]
    fused = [row for row in rows if row["path"].startswith("fused")]
    passed = all(row["share_of_full_logits"] < ALLOWED_SHARE for row in fused)
    verdict = (
        f"{'PASS' if passed else 'FAIL'}: the fused paths stay {'' if passed else 'not '}under "
        f"{ALLOWED_SHARE:.0%} of the full tensor ({ALLOWED_SHARE * FULL_LOGITS_BYTES / MB:.1f} MB)."
    )
    where = machine(options.chunk_tokens)
    report = as_markdown(rows, where, options.chunk_tokens, verdict)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "update_memory.md").write_text(report)
    result = where | {"chunk_tokens": options.chunk_tokens, "passed": passed, "paths": rows}
    (RESULTS / "update_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(report)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
