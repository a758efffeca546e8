"""Memory of a training worker, an engine or a scorer, in bytes. Pure arithmetic.

A backward pass peaks at one of three points: in the head, with a chunk of logits; in the last layer, after
the last norm is freed, where the MLP holds 2 I s more of gradients than it has freed; or under ZeRO-2 at its
end, when the gradients of another micro-batch are added to the accumulated ones. The optimizer's step may
need more than all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayrlhf.capacity import expert_memory
from rayrlhf.capacity.activations import Adapter, Precision, activation_terms, activations, divided
from rayrlhf.capacity.model_shape import ModelShape
from rayrlhf.config.train import OptimizerConfig

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "buffers")

MAX_BUCKET_NUMEL = 200_000_000  # train.engine's limit of a communication buffer
MAX_LIVE_NUMEL = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
MAX_STEP_NUMEL = 1_000_000_000  # DeepSpeed's sub_group_size, of ZeRO-3
NF4_BITS = 4.127  # per weight, with double quantisation of blocks of 64 (arXiv 2305.14314)
PIXEL_CACHE_BYTES = 256 << 20  # models.vision's limit of the pixel values of images seen before
ENGINE_RUNTIME_BYTES = 3 * 2**29  # CUDA context and graphs: an estimate


@dataclass(frozen=True)
class Bytes:
    """Bytes by kind, on the device and in host memory, and lines with the arithmetic (`working`)."""

    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    working: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            Counter(self.device) + Counter(other.device),
            Counter(self.host) + Counter(other.host),
            self.working + other.working,
        )

    def only(self, *kinds: str) -> Bytes:
        """These kinds of the bytes on the device; those of the host are kept."""
        kept = {kind: size for kind, size in self.device.items() if kind in kinds}
        return Bytes(kept, self.host, self.working)


def weight_bytes(shape: ModelShape, count: int, size: int, adapter: Adapter | None = None) -> int:
    """Bytes of `count` parameters; frozen projections may be quantised."""
    if adapter is None:
        return count * size
    in_nf4 = _in_nf4(shape, adapter)
    return round(in_nf4 * NF4_BITS / 8) + (count - in_nf4 + adapter.parameters(shape)) * size


def _weight_terms(shape: ModelShape, count: int, size: int, adapter: Adapter | None) -> str:
    if adapter is None:
        return f"{_count(count)} x {size} B"
    in_nf4 = _in_nf4(shape, adapter)
    parts = [f"{_count(in_nf4)} x {NF4_BITS} bits"] if in_nf4 else []
    parts += [
        f"{_count(count - in_nf4)} x {size} B",
        f"adapters {_count(adapter.parameters(shape))} x {size} B",
    ]
    return f"({' + '.join(parts)})"


def _in_nf4(shape: ModelShape, adapter: Adapter) -> int:
    """Parameters in NF4: linear layers. Experts are not quantised: transformers has all those of a layer in
    one tensor.
    """
    if not adapter.quantized:
        return 0
    if not shape.experts:
        return shape.layers * (shape.attention_matrices + shape.mlp_matrices)
    shared = 3 * shape.hidden * shape.shared_expert + shape.hidden * shape.family.has_shared_expert
    dense = 3 * shape.hidden * shape.dense_intermediate
    return shape.layers * shape.attention_matrices + shape.expert_layers * shared + shape.dense_layers * dense


def head_bytes(
    shape: ModelShape, chunk_tokens: int, precision: Precision, tokens: int, adapter: Adapter | None = None
) -> tuple[int, int]:
    """(temporary, lasting) bytes of the head.

    Temporary: a chunk of fp32 logits, the gradients of its input and, unless only adapters are trained, of
    its weight. Lasting: if the weight is tied, its gradient, until that of the embedding is added.
    """
    weight_gradient = shape.embedding_parameters * 4 if adapter is None else 0
    lasting = weight_gradient if shape.tied else 0
    input_gradient = tokens * shape.hidden * precision.weights
    return chunk_tokens * shape.vocabulary * 4 + input_gradient + weight_gradient - lasting, lasting


def trainer(
    shape: ModelShape,
    train: OptimizerConfig,
    precision: Precision,
    *,
    num_workers: int,
    name: str,
    adapter: Adapter | None = None,
    sequence_parallel: int = 1,
    has_head: bool = True,
    has_balance_loss: bool = False,
    freeze_vision: bool = False,
    image_tokens: int = 0,
) -> Bytes:
    """Peak of one worker in a step of several micro-batches. `has_head`: a language model, not a scorer."""
    stage, ranks, s = train.zero_stage, num_workers, precision.weights
    count = shape.parameters if has_head else shape.scorer_parameters
    trained = count - (shape.vision_parameters if freeze_vision else 0)
    trained = adapter.parameters(shape) if adapter else trained
    shared = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}
    split = {kind: ranks if kind in shared.get(stage, ()) else 1 for kind in KINDS}
    weights = weight_bytes(shape, count, s, adapter) // split["weights"]
    g = 4 if train.grad_accum_dtype == "float32" else s
    gradients = trained * g // split["gradients"]
    # ZeRO keeps master weights even of fp32 weights; without ZeRO only 16-bit weights have them.
    m = 4 if train.master_weights == "float32" else 2
    has_master = stage > 0 or s == 2
    optimizer = trained * (2 * m + m * has_master) // split["optimizer"]
    tokens = train.max_tokens_per_micro_batch
    kept = activations(
        shape,
        precision,
        checkpointing=train.gradient_checkpointing,
        offload=train.activation_offload,
        adapter=adapter,
        has_balance_loss=has_balance_loss,
        freeze_vision=freeze_vision,
        image_tokens=image_tokens,
    )
    at_the_head = kept.at_the_head(tokens, sequence_parallel)
    backward = max(at_the_head, kept.in_the_last_layer(tokens, sequence_parallel), kept.in_the_tower)
    logits = 0
    if has_head:
        own_tokens = tokens // sequence_parallel
        temporary, lasting = head_bytes(shape, train.logprob_chunk_tokens, precision, own_tokens, adapter)
        logits = lasting + max(0, at_the_head + temporary - backward)
    resting = _buffers(shape, train, trained, s)
    # With several ranks a copy of the bucket is reduced.
    buffers = resting + (_bucket_bytes(trained, s) if stage and ranks > 1 else 0)
    if not train.offload_optimizer:
        own = trained // split["optimizer"]
        buffers = max(buffers, _late_bytes(own, stage, s, g, m, resting) - backward - logits)
    device = {
        "weights": 0 if train.offload_params else weights,
        "gradients": gradients,
        "optimizer": 0 if train.offload_optimizer else optimizer,
        "activations": backward,
        "logits": logits,
        "buffers": buffers,
    }
    host = {
        "weights": weights if train.offload_params else 0,
        # An offloaded optimizer has its gradients on the host: the accumulated ones, and in fp32.
        "optimizer": optimizer + trained * (g + 4) // ranks if train.offload_optimizer else 0,
    }
    pinned = precision.on_gpu
    if kept.offloaded:
        host["offloaded activations"] = kept.offloaded * kept.input_bytes(
            tokens, sequence_parallel, pinned=pinned
        )
    if image_tokens:
        host["pixels"] = PIXEL_CACHE_BYTES
    gradients_offloaded = stage == 3 and train.offload_optimizer
    if gradients_offloaded:
        device["gradients"] = 0  # offloaded as they are computed
    zero = f"ZeRO-{stage} over {ranks}"
    masters = f", {'fp32' if m == 4 else 'bf16'} weights" if has_master else ""
    masters += ", gradients twice" if train.offload_optimizer else ""
    states = f"{2 * m + m * has_master + (g + 4) * train.offload_optimizer} B (two moments{masters})"
    working = {
        "weights": f"{_weight_terms(shape, count, s, adapter)}"
        + divided(split["weights"], zero)
        + _on_host(train.offload_params),
        "gradients": f"{_count(trained)} x {g} B" + divided(split["gradients"], zero),
        "optimizer": f"{_count(trained)} x {states}"
        + divided(split["optimizer"], zero)
        + _on_host(train.offload_optimizer),
        "activations": activation_terms(kept, tokens, sequence_parallel),
    }
    if kept.offloaded:
        size = kept.input_bytes(tokens, sequence_parallel, pinned=pinned)
        rounded = " (pinned: a power of two)" * pinned
        working["offloaded activations"] = f"{kept.offloaded} layers x {size:,} B{rounded}" + _on_host(
            offloaded=True
        )
    if gradients_offloaded:
        del working["gradients"]
    if shape.vision is not None and image_tokens:
        working["images"] = f"at most {image_tokens:,} tokens of a micro-batch, all of different images"
    lines = tuple(f"{name} {kind}: {terms}" for kind, terms in working.items())
    return Bytes(_positive(device), _positive(host), lines)


def _bucket_bytes(trained: int, s: int) -> int:
    return min(MAX_BUCKET_NUMEL, trained) * s


def _buffers(shape: ModelShape, train: OptimizerConfig, trained: int, s: int) -> int:
    """DeepSpeed's communication buffers: gradient buckets; with ZeRO-3 also the gathered layers."""
    if train.zero_stage == 0:
        return 0
    reduce = _bucket_bytes(trained, s) * (1 + train.overlap_comm)
    if train.zero_stage < 3:
        return reduce
    live = min(MAX_LIVE_NUMEL, max(2 * shape.layer_parameters, shape.embedding_parameters))
    # The limit holds for what is gathered early; a layer's experts are one module, gathered as a whole.
    return reduce + max(live, shape.mlp_matrices if shape.experts else 0) * s


def _late_bytes(own: int, stage: int, s: int, g: int, m: int, buffers: int) -> int:
    """Bytes in addition to state and gradients after the activations are freed, for a rank that updates `own`
    parameters. Bytes per element: s of weights, g of accumulated gradients, m of master weights.

    At the end of a backward pass these are the communication buffers and under ZeRO-2 the gradients of one
    micro-batch, which are added to those of the others. In the step ZeRO makes a flat copy of gradients (of a
    part at a time under ZeRO-3), and one in the dtype of the masters; ZeRO 1 and 2 have freed the buffers by
    then. Under ZeRO-2 fp32 gradients of 16-bit weights are flat from the start, and added as they come.
    """
    if stage == 0 or (stage == 2 and g != s):
        return buffers
    copies = g + (m if m > g else 0)
    if stage == 3:
        return buffers + min(own, MAX_STEP_NUMEL) * copies
    return max(buffers + (own * g if stage == 2 else 0), own * copies)


def frozen(
    shape: ModelShape,
    precision: Precision,
    *,
    name: str,
    ranks: int = 1,
    tokens: int = 0,
    has_head: bool = True,
) -> Bytes:
    """A model that is not trained, in a worker (partitioned over `ranks` under ZeRO-3) or in its own replica
    with micro-batches of `tokens`.
    """
    count = shape.parameters if has_head else shape.scorer_parameters
    s = precision.weights
    forward = tokens * _forward_numbers(shape) * s
    working = (f"{name} weights: {_count(count)} x {s} B" + divided(ranks, f"ZeRO-3 over {ranks}"),)
    return Bytes(_positive({"weights": count * s // ranks, "activations": forward}), {}, working)


def _forward_numbers(shape: ModelShape) -> int:
    """Temporary numbers of a forward pass without gradients, per token."""
    mlp = expert_memory.forward_numbers(shape) if shape.experts else 2 * shape.intermediate
    return mlp + 4 * shape.hidden


def kv_bytes_per_token(shape: ModelShape, size: int, tensor_parallel: int = 1) -> int:
    """Bytes of the keys and values of all layers; a GPU holds at least one of the heads."""
    heads = -(-shape.kv_heads // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * size


def engine(
    shape: ModelShape,
    *,
    size: int,
    tensor_parallel: int,
    capacity_bytes: int | None,
    utilization: float,
    batch_tokens: int,
    cpu_kv_bytes: int | None = None,
    adapter: Adapter | None = None,
) -> Bytes:
    """A vLLM engine on one of its GPUs (or a CPU, with a cache of `cpu_kv_bytes`): it takes `utilization` of
    the GPU, and the cache gets what weights and temporaries leave. `batch_tokens`: of one step on a GPU;
    `adapter`: has buffers on every GPU.
    """
    of_adapter = adapter.parameters(shape) * size if adapter is not None else 0
    weights = shape.parameters * size // tensor_parallel
    working = (f"engine weights: {_count(shape.parameters)} x {size} B" + divided(tensor_parallel, "GPUs"),)
    if cpu_kv_bytes is not None:
        packed = (shape.linear_parameters + shape.vision_parameters) * size // tensor_parallel
        working += (f"engine's packed copies of its matrices: {packed / 2**30:.1f} GiB",)
        held = {"weights": weights, "kv_cache": cpu_kv_bytes, "buffers": of_adapter + packed}
        return Bytes(_positive(held), {}, working)
    temporaries = batch_tokens * _forward_numbers(shape) * size
    if shape.vision is not None:  # a batch of image tokens alone, before the language model reads them
        patches = batch_tokens * shape.vision.patches_per_token
        temporaries = max(temporaries, patches * shape.vision.forward_bytes(size))
    buffers = temporaries // tensor_parallel + of_adapter + ENGINE_RUNTIME_BYTES
    if capacity_bytes is None:
        return Bytes({"weights": weights, "buffers": buffers}, {}, working)
    cache = max(0, int(capacity_bytes * utilization) - weights - buffers)
    working += (f"engine cache: {utilization:g} x {capacity_bytes / 2**30:.1f} GiB - weights - buffers",)
    return Bytes({"weights": weights, "kv_cache": cache, "buffers": buffers}, {}, working)


def _positive(sizes: Mapping[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in sizes.items() if size}


def _count(number: int) -> str:
    return f"{number / 1e9:.4g}e9" if number >= 1e9 else f"{number / 1e6:.4g}e6"


def _on_host(offloaded: bool) -> str:
    return ", in host memory" if offloaded else ""
