"""Decoder layers compiled by torch.compile, each on its own (`model.compile`).

All layers of a model run the same few graphs: what comes before attention, and what comes after it, in
which the compiler fuses norms, rotations, activations and residual additions. Their number of tokens is
symbolic, so that a stream of another length uses the same graphs. Attention and experts stay as they are:
what they do depends on lengths and routing. So do embeddings, heads and the names of parameters.

Numbers are those of the eager layers up to the order of sums: in fp32, gradients are within 1e-5 of the
largest element of each (tests/models/test_compiled_layers.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import AttentionInterface

from rayrlhf.models.attention import KERNELS
from rayrlhf.models.experts import moe_layers
from rayrlhf.models.streams import decoder_layers

# Graphs of a piece of a layer in one process: for training and inference, with and without adapters, for the
# actor, the critic and the reference. torch's default is 8; beyond it, layers silently run as they are.
MOST_GRAPHS = 64
CACHE = Path("~/.cache/rayrlhf/inductor")  # or TORCHINDUCTOR_CACHE_DIR; torch's default is shared, in /tmp
Backend = str | Callable[..., Any]


def compile_layers(model: nn.Module, *, backend: Backend = "inductor") -> None:
    """Compile the decoder layers of `model`, at their first use. Vision towers stay as they are.

    Raises `ValueError` if it has no layers of transformers' form.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"compile=true with {type(model).__name__}, whose decoder has no layers of transformers' form: "
            "set model.compile (of a reward model: its source's compile) to false"
        )
    if backend == "inductor":
        _use_private_cache()
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(MOST_GRAPHS, limits.recompile_limit)
    for name, kernel in KERNELS.items():
        AttentionInterface.register(name, torch.compiler.disable(kernel))
    for name, _, _ in moe_layers(model):
        block: Any = model.get_submodule(name)
        block.forward = torch.compiler.disable(block.forward)
    for layer in layers:
        # Not `layer.compile()`: hooks of the layer stay outside of the graphs.
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def why_not_compiled(*, on_gpu: bool) -> str | None:
    """What this machine lacks to build kernels; None if it has all."""
    missing = []
    if on_gpu:
        if importlib.util.find_spec("triton") is None:
            missing.append("the package triton, which comes with torch's CUDA builds")
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            missing.append("a C compiler (gcc)")
    elif _cpp_compiler() is None:
        missing.append("a C++ compiler (g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h, in the package python3-dev)")
    return " and ".join(missing) or None


def check_compiler(*, on_gpu: bool) -> None:
    """Raises `ValueError` if this machine cannot build kernels."""
    if missing := why_not_compiled(on_gpu=on_gpu):
        raise ValueError(
            f"compile=true needs {missing}, which this machine does not have: install what is missing "
            "on every node of the run, or set model.compile (or that of a reward model's source) to false"
        )


def _cpp_compiler() -> str | None:
    """The one that torch would use."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def _use_private_cache() -> None:
    """Compiled kernels are libraries that the next process loads: they belong in a folder of this user."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = CACHE.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
