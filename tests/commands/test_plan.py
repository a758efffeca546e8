"""`rayrlhf plan` from its command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rayrlhf.capacity.budget import budget_of
from rayrlhf.capacity.gpu_types import parse_gpus
from rayrlhf.commands.plan import main
from rayrlhf.config.job_kinds import load_any

REPOSITORY = Path(__file__).parents[2]
MERGED = "rollout.weight_sync.lora=merged"
CONFIGS = REPOSITORY / "jobs" / "configs"
GPU_CONFIGS = sorted(path.name for path in CONFIGS.glob("*-8x-gpu.yaml"))


def config(name: str) -> str:
    return str(CONFIGS / name)


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_every_shipped_config_for_eight_gpus_fits_on_them(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config(name), "--gpus", "8xA100-80"]) == 0
    output = capsys.readouterr().out
    assert "fits" in output and "NOT" not in output and "Working:" in output


def test_a_70b_model_is_tuned_on_16_gpus_of_80_gb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config("ppo-70b-16x-a100-80.yaml"), "--gpus", "16xA100-80"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "actor weights: 70.55e9 x 2 B / 16 (ZeRO-3 over 16)" in output
    assert (
        "critic optimizer: 69.5e9 x 18 B (two moments, fp32 weights, gradients twice) / 16 (ZeRO-3 over 16), "
        "in host memory" in output
    )


def test_adapters_of_every_expert_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config("sft-mixtral-8x7b-lora-8x-gpu.yaml"), "--gpus", "8xA100-80"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    experts = 8 * (4096 + 2 * 14336 + 14336 + 4096)
    assert 16 * 32 * (attention + experts) == 223_346_688
    assert "(46.7e9 x 2 B + adapters 223.3e6 x 2 B) / 8 (ZeRO-3 over 8)" in output


@pytest.mark.parametrize("words, shown", [([], True), (["model.freeze_vision=true"], False)])
def test_vision_towers_are_counted_for_a_bound_on_image_tokens(
    words: list[str], shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config("grpo-qwen2.5-vl-7b-8x-gpu.yaml"), *words, "--gpus", "8xA100-80"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    # Half of 16,384 tokens, as prompts have up to 2,048 tokens and responses too.
    assert "actor images: at most 8,192 tokens of a micro-batch" in output
    trained = "8.292e9" if shown else "7.616e9"
    assert f"actor optimizer: {trained} x 12 B" in output
    assert ("of the vision tower" in output) is shown


def test_a_7b_model_is_tuned_on_4_gpus_of_24_gb() -> None:
    assert main([config("ppo-7b-4x-24gb.yaml"), "--gpus", "4x24GB", "--gpus-per-node", "4"]) == 0


def test_34b_dpo_fits_on_8_gpus_of_80_gb() -> None:
    """Over eight: weights 8.4, reference 8.4, gradients 8.4 and an optimizer of 50.6 GB."""
    overrides = [
        "model.path=codellama/CodeLlama-34b-hf",
        "train.num_workers=8",
        "train.zero_stage=3",
        "train.gradient_checkpointing=true",
        "train.offload_optimizer=true",
    ]
    assert main([config("dpo-8x-gpu.yaml"), *overrides, "--gpus", "8xA100-80"]) == 0
    assert main([config("dpo-8x-gpu.yaml"), *overrides[:-1], "--gpus", "8xA100-80"]) == 1


def test_what_does_not_fit_is_reported_with_changes_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [config("grpo-8x-gpu.yaml")]
    assert main([*argv, "--gpus", "8xA100-40"]) == 1
    output = capsys.readouterr().out
    assert "does NOT fit" in output
    after = output.partition("The cheapest ways to make it fit:")[2].strip().splitlines()
    ways = [line.partition("  (")[0].split() for line in after if "GiB at most" in line]
    assert 1 <= len(ways) <= 3
    for overrides in ways:
        assert main([*argv, *overrides, "--gpus", "8xA100-40"]) == 0, overrides


def test_sequences_too_long_for_one_gpu_are_shared(capsys: pytest.CaptureFixture[str]) -> None:
    """What 32 layers keep, 8 KiB per token each, is 32 GiB for 131,072 tokens."""
    argv = [config("sft-8x-gpu.yaml"), "data.max_tokens=131072", "train.max_tokens_per_micro_batch=131072"]
    assert main([*argv, "--gpus", "8xA100-40"]) == 1
    output = capsys.readouterr().out.partition("The cheapest ways to make it fit:")[2].strip()
    overrides = output.partition("  (")[0].split()
    assert overrides[0].startswith("model.sequence_parallel=")
    assert main([*argv, *overrides, "--gpus", "8xA100-40"]) == 0


@pytest.mark.parametrize("gpus", ["4xA100-80", "8xRTX4090", "16xH100"])
def test_a_suggestion_loads_and_fits(gpus: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [config("grpo-8x-gpu.yaml")]
    main([*argv, "--gpus", gpus, "--suggest"])
    snippet = "# Suggested" + capsys.readouterr().out.partition("# Suggested")[2]
    assert yaml.safe_load(snippet)["placement"]["preset"]
    (tmp_path / "suggested.yaml").write_text(snippet)
    suggested = load_any([*argv, str(tmp_path / "suggested.yaml")])
    count, gpu = parse_gpus(gpus)
    budget = budget_of(suggested, gpu=gpu)
    assert budget.fits and budget.spec.num_slots <= count


def test_sleeping_engines_are_judged_by_phases() -> None:
    """By hand for slot 0: what trains is not there while engines roll out, but for its weights."""
    gpu = parse_gpus("8xA100-80")[1]
    loaded = load_any([config("grpo-8x-gpu.yaml"), "placement.preset=colocate_all", "rollout.num_engines=4"])
    budget = budget_of(loaded, gpu=gpu)
    actor, engine = budget.roles["actor"], budget.roles["rollout"]
    assert {phase: sizes[0] for phase, sizes in budget.phases.items()} == {
        "training": actor.total + 3 * 2**29,
        "weight sync": actor.device["weights"] + engine.device["weights"] + engine.device["buffers"],
        "rollout": actor.device["weights"] + engine.total,
    }


def test_it_counts_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config("demo.yaml"), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output["ppo"]["roles"]) == {"actor", "rollout"} and output["ppo"]["fits"] is None


def test_what_if_adapters_are_trained() -> None:
    argv = [config("sft-8x-gpu.yaml"), "train.num_workers=1", "train.max_tokens_per_micro_batch=4096"]
    assert main([*argv, "--gpus", "1x24GB"]) == 1
    assert main([*argv, "--gpus", "1x24GB", "--qlora"]) == 0


def test_engines_that_sleep_keep_the_base_of_adapters_in_host_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def host_bytes(*words: str) -> int:
        assert main([config("ppo-7b-4x-24gb.yaml"), "model.lora.rank=8", "--json", *words]) == 0
        [stage] = json.loads(capsys.readouterr().out).values()
        return sum(stage["roles"]["rollout"]["host_bytes"].values())

    # Llama-2-7B in bf16, tensor_parallel: 4; adapters of rank 8 are whole on every GPU.
    adapters = 8 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 2
    assert host_bytes() == 6_738_415_616 * 2 // 4 + adapters
    assert host_bytes(MERGED) == 0
    assert host_bytes("rollout.sleep=false") == adapters


def test_pushes_of_adapters_alone_need_little_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def synced(*words: str) -> int:
        assert main([config("ppo-7b-4x-24gb.yaml"), "model.lora.rank=8", "--json", *words]) == 0
        [stage] = json.loads(capsys.readouterr().out).values()
        return stage["published_bytes"]

    adapters = 8 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 2
    assert synced() == adapters
    assert synced(MERGED) == synced("model.quantization=nf4") == 6_738_415_616 * 2


@pytest.mark.parametrize("adapters", ["--qlora", "--lora-rank=8", "model.lora.rank=8"])
def test_a_model_with_adapters_is_its_own_reference(
    adapters: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [config("ppo-7b-4x-24gb.yaml"), "--gpus", "4x24GB", "--gpus-per-node", "4"]
    for words, held in (argv, True), ([*argv, adapters], False):
        assert main(words) == 0
        assert ("ref weights: " in capsys.readouterr().out) is held


@pytest.mark.parametrize(
    "words, message",
    [
        ([config("demo.yaml"), "--gpus", "many"], "wanted: COUNTxNAME such as 16xA100-80"),
        ([config("demo.yaml"), "--suggest"], "--suggest needs --gpus"),
        ([config("demo.yaml"), "train.nmu_steps=3"], "train.nmu_steps"),
        ([config("demo.yaml"), "model.path=nobody/nothing"], "download the model's config.json"),
    ],
)
def test_bad_input_is_reported(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_it_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rayrlhf.commands.cli import main; "
        f"code = main(['plan', {config('ppo-8x-gpu.yaml')!r}, '--gpus', '8xA100-80']); "
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules); "
        "raise SystemExit(code if not heavy else str(heavy))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5  # about 0.3 s on an idle machine
