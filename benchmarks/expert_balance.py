"""What model.aux_loss_coef does to the load of the experts of a small mixture of experts, on CPUs.

A Mixtral of two layers with random weights learns the bytes of this repository's documents (continued
pretraining: jobs/sft.py with data.learn: all), as one job per coefficient, all else the same: initial
weights, samples and their order, learning rate and seed. Reported are, step by step, the load of the busiest
expert, the share of experts without a token, and the loss without the balance loss's share.

Usage: `python -m benchmarks.expert_balance [--steps 150] [--out benchmarks/results]`; it takes some minutes
on two cores. Writes expert_balance.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.estimators import cpu_model, smoothed
from jobs.demo.model import REPOSITORY

COEFFICIENTS = (0.0, 0.01, 0.1)
NUM_EXPERTS, EXPERTS_PER_TOKEN, NUM_LAYERS = 8, 2, 2
WORST_LOAD = NUM_EXPERTS / EXPERTS_PER_TOKEN  # one of the experts of every token is the same
SAMPLES_PER_STEP, BYTES_PER_SAMPLE = 16, 128
LR = 3e-3
SEED = 0
HIGH_LOAD = 3.0
LAST = 20  # steps of the table's means
PACKAGES = ("torch", "ray", "deepspeed", "transformers")
METRICS = {
    "experts/model_load_max": "load of the busiest expert\n(multiple of the mean)",
    "experts/model_unused_fraction": "experts without a token\n(% of all)",
    "nll": "loss without the balance loss\n(nats per byte)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        num_texts = write_texts(folder / "texts.jsonl")
        results = {str(coef): run(coef, arguments.steps, folder) for coef in COEFFICIENTS}
    report = {
        "steps": arguments.steps,
        "lr": LR,
        "seed": SEED,
        "texts": num_texts,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cpu_model()}",
        "versions": {package: version(package) for package in PACKAGES},
        "command": f"python -m benchmarks.expert_balance --steps {arguments.steps}",
        "results": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "expert_balance.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "expert_balance.md").write_text(table(report))
    plot(report, arguments.out / "expert_balance.png")
    print(table(report))
    return 0


def make_model(path: Path) -> None:
    """Random weights as transformers initialises them, routers included (standard deviation 0.02)."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

    tokenizer = make_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        max_position_embeddings=512,
        initializer_range=0.02,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        dtype="float32",
    )
    torch.manual_seed(SEED)
    MixtralForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_texts(path: Path) -> int:
    """Rows {text} of the repository's documents, cut into pieces; their number."""
    documents = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    documents += sorted((REPOSITORY / "docs").glob("*.md"))
    text = "\n".join(document.read_text("utf-8") for document in documents).encode("ascii", "ignore").decode()
    starts = range(0, len(text) - BYTES_PER_SAMPLE, BYTES_PER_SAMPLE)
    rows = [{"text": text[start : start + BYTES_PER_SAMPLE]} for start in starts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return len(rows)


def run(coef: float, steps: int, folder: Path) -> dict[str, list[float]]:
    """Train with one coefficient; its metrics step by step."""
    print(f"model.aux_loss_coef={coef:g} ...", flush=True)
    name = f"coef-{coef:g}"
    config = {
        "job": "sft",
        "run": {"name": name, "dir": str(folder / "runs"), "seed": SEED},
        "model": {"path": str(folder / "model"), "aux_loss_coef": coef},
        "data": {
            "train": str(folder / "texts.jsonl"),
            "format": "text",
            "learn": "all",
            "max_tokens": BYTES_PER_SAMPLE + 8,
        },
        "train": {
            "num_steps": steps,
            "samples_per_step": SAMPLES_PER_STEP,
            "lr": LR,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "zero_stage": 0,
            "max_tokens_per_micro_batch": SAMPLES_PER_STEP * (BYTES_PER_SAMPLE + 8),
        },
        "checkpoint": {"every_steps": None, "export": False},
        "observe": {"console": "lines", "tensorboard": False},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "jobs/sft.py", str(folder / f"{name}.yaml")], cwd=REPOSITORY, check=True)
    return read(folder / "runs" / name, coef)


def read(run_folder: Path, coef: float) -> dict[str, list[float]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    steps_done = [row for row in map(json.loads, lines) if "loss/model" in row]
    for row in steps_done:
        row["nll"] = row["loss/model"] - coef * row.get("loss/model_balance", 0.0)
    return {key: [round(row[key], 4) for row in steps_done] for key in METRICS}


def label(coef: str) -> str:
    return f"aux_loss_coef {float(coef):g}"


def at_the_end(values: list[float]) -> float:
    last = values[-LAST:]
    return sum(last) / len(last)


def table(report: dict[str, Any]) -> str:
    rows: list[str] = []
    for coef, result in report["results"].items():
        load, unused, nll = (at_the_end(result[key]) for key in METRICS)
        high = sum(load > HIGH_LOAD for load in result["experts/model_load_max"])
        rows.append(f"| {float(coef):g} | {high} | {load:.2f} | {unused:.0%} | {nll:.3f} |")
    return "\n".join(
        [
            f"# Load of the experts with and without a balance loss: {report['steps']} steps",
            "",
            f"A Mixtral with random weights ({NUM_LAYERS} layers, hidden size 64, {NUM_EXPERTS} experts, "
            f"{EXPERTS_PER_TOKEN} per token, everything initialised with the standard deviation 0.02 that "
            f"Mixtral's config has) learns {report['texts']:,} pieces of {BYTES_PER_SAMPLE} bytes of this "
            f"repository's documents with `jobs/sft.py`, `data.learn: all`, fp32 on CPUs: {SAMPLES_PER_STEP} "
            f"pieces per step, AdamW with a constant learning rate of {report['lr']:g} and no warm-up. "
            "The runs differ in `model.aux_loss_coef` alone. That rate is high on purpose, so that routers "
            "collapse: an expert without a token gets no gradient, and so no reason to be chosen later.",
            "",
            f"The load is the busiest expert's tokens over the mean, averaged over layers: 1 is even, "
            f"{WORST_LOAD:g} is one expert to which every token is sent. Columns without "
            f"another range are means of the last {LAST} steps.",
            "",
            f"| `model.aux_loss_coef` | steps with a load over {HIGH_LOAD:g} | load of the busiest expert "
            "| experts without a token | loss without the balance loss, nats per byte |",
            "|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "In the first steps every run sends most tokens to one expert per layer: the coefficient "
            "decides whether that stays so. The share of experts without a token is noisy, for it counts "
            f"{NUM_LAYERS * NUM_EXPERTS} experts.",
            "",
            "![Load of the busiest expert, experts without a token, and loss per step](expert_balance.png)",
            "",
            f"{report['machine']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
            f"Command: `{report['command']}`. One seed.",
            "",
        ]
    )


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(METRICS), 1, figsize=(7, 8), sharex=True)
    for axes, (key, name) in zip(rows, METRICS.items(), strict=True):
        for coef, result in report["results"].items():
            scale = 100 if key == "experts/model_unused_fraction" else 1
            values = [scale * value for value in smoothed(result[key])]
            axes.plot(range(1, len(values) + 1), values, label=label(coef))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    rows[0].axhline(WORST_LOAD, color="gray", linestyle=":", label="one expert gets every token")
    rows[0].axhline(1, color="gray", linestyle="--", label="even")
    rows[0].set_ylim(0.8, 1.08 * WORST_LOAD)
    rows[1].set_ylim(-3, 100)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize="small")
    rows[-1].set_xlabel(f"step ({SAMPLES_PER_STEP} samples each); means of 3 steps")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
