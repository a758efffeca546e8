"""Memory of a training worker, an engine or a scorer, in bytes. Pure arithmetic.

What autograd keeps was counted from the tensors that transformers' decoders save with packed sequences, and
agrees with torch's allocator (benchmarks/planner.py). Per token of a layer, s bytes an element:

    two RMSNorms      2 (4 + 2s) H    the input in fp32, the normalised input, the output
                                      (in fp32 the first is no copy, which comes to the same 12 H)
    attention         c A D s + 2 K D s + 4 A
                                      queries, output, keys and values after their rotation, log-sum-exp;
                                      c = 2, or 3 where the output is copied to another layout (SDPA on
                                      a CPU)
    gated MLP         4 I s           gate, its activation, up, their product (of all experts of a token)

and outside the layers (4 + 2s) H + s H for the last norm, and 2 D s of cosines and sines. With gradient
checkpointing a layer keeps its input, s H, and one layer at a time is recomputed.

A backward pass peaks at one of three points: in the head, with a chunk of logits; in the last layer, after
the last norm is freed, where the MLP holds 2 I s more of gradients than it has freed; or under ZeRO-2 at its
end, when the gradients of another micro-batch are added to the accumulated ones. The optimizer's step may
need more than all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayrlhf.capacity import expert_memory
from rayrlhf.capacity.model_shape import ModelShape
from rayrlhf.config.train import OptimizerConfig

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "buffers")

MAX_BUCKET_NUMEL = 200_000_000  # train.engine's limit of a communication buffer
MAX_LIVE_NUMEL = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
MAX_STEP_NUMEL = 1_000_000_000  # DeepSpeed's sub_group_size, of ZeRO-3
NF4_BITS = 4.127  # per weight, with double quantisation of blocks of 64 (arXiv 2305.14314)
ENGINE_BATCH_TOKENS = 8_192  # of vLLM's scheduler on a GPU
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


@dataclass(frozen=True)
class Adapter:
    """LoRA on the linear layers; the rest of the model is frozen. In a mixture of experts the MLPs take none:
    the experts have their own, and only if asked for.
    """

    rank: int
    targets: tuple[str, ...] | None = None  # last names of the layers; None is all
    quantized: bool = False  # QLoRA: frozen projections in NF4
    experts: bool = False

    def parameters(self, shape: ModelShape) -> int:
        """Trainable: rank x (inputs + outputs) of each adapted layer, and of each expert's."""
        each = 3 * (shape.hidden + shape.intermediate)  # gate and up are one: H + 2I, and I + H
        each -= shape.hidden
        experts = shape.expert_layers * shape.experts * each if self.experts else 0
        query, kv, mlp = (shape.hidden + n for n in (shape.query_size, shape.kv_size, shape.intermediate))
        sizes = {"q_proj": query, "k_proj": kv, "v_proj": kv, "o_proj": query}
        sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), mlp)
        linear = shape.layers * sum(sizes[name] for name in self._adapted(shape))
        if shape.shared_expert and (self.targets is None or "shared_expert_gate" in self.targets):
            linear += shape.expert_layers * (shape.hidden + 1)
        return self.rank * (linear + experts)

    def between(self, shape: ModelShape) -> int:
        """Elements between A and B, per token of a layer."""
        return self.rank * len(self._adapted(shape))

    def _adapted(self, shape: ModelShape) -> list[str]:
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        names += [] if shape.experts else ["gate_proj", "up_proj", "down_proj"]
        return [name for name in names if self.targets is None or name in self.targets]


@dataclass(frozen=True)
class Precision:
    """Bytes per element."""

    weights: int
    on_gpu: bool


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


def layer_activation_bytes(shape: ModelShape, precision: Precision, adapter: Adapter | None = None) -> int:
    """Bytes that autograd keeps of a layer, per token. Frozen norms do not keep their normalised input, and
    adapters keep the activations between A and B.
    """
    s, kept = precision.weights, _kept_by_norm(precision, adapter)
    norms = shape.family.norms_per_layer * (kept * shape.hidden + 4)
    copies = 2 if precision.on_gpu else 3
    attention = (copies * shape.query_size + 2 * shape.kv_size) * s + 4 * shape.heads
    if shape.family.qk_norm:
        attention += (kept - s) * (shape.query_size + shape.kv_size)
    if shape.experts:
        rank = adapter.rank if adapter is not None and adapter.experts else 0
        mlp = expert_memory.kept_bytes(shape, s, trained=adapter is None, rank=rank)
    else:
        mlp = 4 * shape.intermediate * s
    return norms + attention + mlp + (adapter.between(shape) * s if adapter is not None else 0)


def _dense_layer_saves(shape: ModelShape, size: int, adapter: Adapter | None) -> int:
    """Bytes by which a layer without experts keeps less than the others of its model."""
    rank = adapter.rank if adapter is not None and adapter.experts else 0
    experts = expert_memory.kept_bytes(shape, size, trained=adapter is None, rank=rank)
    return experts - (4 if adapter is None else 3) * shape.dense_intermediate * size


def _kept_by_norm(precision: Precision, adapter: Adapter | None) -> int:
    """Bytes per element: the input in fp32, the normalised input if the norm is trained, the output."""
    return 4 + precision.weights * (2 if adapter is None else 1)


@dataclass(frozen=True)
class Activations:
    """Bytes per token that autograd keeps of a micro-batch when its backward pass begins, and what is added.

    Ranks that split the tokens still hold all keys and values of a layer.
    """

    layers: int  # times `kept`
    kept: int  # of a layer
    last_norm: int  # freed before the backward pass of the layers
    rotary: int
    recomputed: int  # of the layer that is recomputed
    gradients: int  # of the MLP, beyond what it has freed
    gathered: int  # keys and values of a layer, part of `kept` or `recomputed`
    checkpointing: bool
    saved: int = 0  # what layers without experts keep less, of all
    routed: int = 0  # of all routers: logits and choices
    balance: int = 0  # of all routers in the backward pass: gradients by a balance loss
    tower_kept: int = 0  # bytes of all images, until the tower's backward pass
    tower_recomputed: int = 0  # bytes of a block of the tower, for all images
    tower_forward: int = 0  # bytes of a frozen tower
    weight_gradient: int = 0  # bytes, of a layer's experts

    @property
    def outside(self) -> int:
        return self.rotary + self.routed - self.saved

    def at_the_head(self, tokens: int, ranks: int = 1) -> int:
        """Bytes of one of `ranks` that split the tokens."""
        gathered = 0 if self.checkpointing else self.layers * self.gathered
        held = self.layers * self.kept + self.last_norm + self.outside
        return self._shared(held, gathered, tokens, ranks) + self.tower_kept

    def in_the_last_layer(self, tokens: int, ranks: int = 1) -> int:
        gathered = (1 if self.checkpointing else self.layers) * self.gathered
        held = self.layers * self.kept + self.outside + self.balance + self.recomputed + self.gradients
        return self._shared(held, gathered, tokens, ranks) + self.tower_kept + self.weight_gradient

    @property
    def in_the_tower(self) -> int:
        """Bytes while the vision tower runs: without gradients before the language model, or backwards."""
        return max(self.tower_forward, self.tower_kept + self.tower_recomputed)

    @staticmethod
    def _shared(held: int, gathered: int, tokens: int, ranks: int) -> int:
        return tokens * gathered + tokens * (held - gathered) // ranks


def activations(
    shape: ModelShape,
    precision: Precision,
    *,
    checkpointing: bool,
    adapter: Adapter | None = None,
    has_balance_loss: bool = False,
    freeze_vision: bool = False,
    image_tokens: int = 0,
) -> Activations:
    """`image_tokens`: of a micro-batch, each of a different image."""
    s, layer = precision.weights, layer_activation_bytes(shape, precision, adapter)
    found = Activations(
        layers=shape.layers,
        kept=s * shape.hidden if checkpointing else layer,
        last_norm=(_kept_by_norm(precision, adapter) + s) * shape.hidden,
        rotary=2 * s * shape.head_dim,
        recomputed=layer if checkpointing else 0,
        gradients=2 * shape.intermediate * s,
        gathered=gathered_bytes(shape, precision),
        checkpointing=checkpointing,
    )
    if shape.experts:
        saved = 0 if checkpointing else shape.dense_layers * _dense_layer_saves(shape, s, adapter)
        found = replace(
            found,
            gradients=expert_memory.gradient_bytes(shape, s),
            saved=saved,
            routed=shape.expert_layers * expert_memory.recorded_bytes(shape, s),
            balance=shape.expert_layers * shape.experts * s * has_balance_loss,
            weight_gradient=expert_memory.weight_gradient_bytes(shape, s) if adapter is None else 0,
        )
    if shape.vision is None or not image_tokens:
        return found
    patches = image_tokens * shape.vision.patches_per_token
    if freeze_vision or adapter is not None:
        return replace(found, tower_forward=patches * shape.vision.forward_bytes(s))
    kept, again = shape.vision.trained_bytes(s, on_gpu=precision.on_gpu, checkpointing=checkpointing)
    return replace(found, tower_kept=patches * kept, tower_recomputed=patches * again)


def gathered_bytes(shape: ModelShape, precision: Precision) -> int:
    """Bytes of the keys and values of a layer, per token."""
    return 2 * shape.kv_size * precision.weights


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
        + _divided(split["weights"], zero)
        + _on_host(train.offload_params),
        "gradients": f"{_count(trained)} x {g} B" + _divided(split["gradients"], zero),
        "optimizer": f"{_count(trained)} x {states}"
        + _divided(split["optimizer"], zero)
        + _on_host(train.offload_optimizer),
        "activations": _activation_terms(kept, tokens, sequence_parallel),
    }
    if gradients_offloaded:
        del working["gradients"]
    if shape.vision is not None and image_tokens:
        working["images"] = f"at most {image_tokens:,} tokens of a micro-batch, all of different images"
    lines = tuple(f"{name} {kind}: {terms}" for kind, terms in working.items())
    return Bytes(_positive(device), _positive(host), lines)


def _activation_terms(kept: Activations, tokens: int, ranks: int) -> str:
    """The largest of the peaks, as a formula."""
    at_the_head, in_layer = kept.at_the_head(tokens, ranks), kept.in_the_last_layer(tokens, ranks)
    tower = f"{kept.tower_kept:,} B of the vision tower" if kept.tower_kept else ""
    if kept.in_the_tower > max(at_the_head, in_layer):
        again = f" + {kept.tower_recomputed:,} B of its recomputed block" if kept.tower_recomputed else ""
        return tower + again if tower else f"{kept.tower_forward:,} B in the frozen vision tower"
    gathered = kept.gathered if ranks > 1 else 0
    layers = 1 if kept.checkpointing else kept.layers
    of_layer = kept.kept - (0 if kept.checkpointing else gathered)
    terms = [f"{kept.layers} layers x {of_layer:,} B" + " kept" * kept.checkpointing]
    outside = kept.rotary + (0 if in_layer > at_the_head else kept.last_norm)
    if in_layer > at_the_head:
        if kept.checkpointing:
            terms.append(f"{kept.recomputed - gathered:,} B of the recomputed one")
        terms.append(f"{kept.gradients:,} B of its gradients")
    if routed := kept.routed + (kept.balance if in_layer > at_the_head else 0):
        terms.append(f"{routed:,} B of routers")
    terms.append(f"{outside:,} B outside")
    per_token = f"({' + '.join(terms)}" + (f" - {kept.saved:,} B of dense layers" if kept.saved else "") + ")"
    formula = f"{tokens:,} tokens x {per_token}"
    if ranks > 1:
        shared = f"{per_token}{_divided(ranks, 'ranks of a sequence')}"
        formula = f"{tokens:,} tokens x ({shared} + {layers} x {gathered:,} B of keys and values)"
    if in_layer > at_the_head and kept.weight_gradient:
        formula += f" + {kept.weight_gradient:,} B of a gradient of experts"
    return formula + (f" + {tower}" if tower else "")


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
    working = (f"{name} weights: {_count(count)} x {s} B" + _divided(ranks, f"ZeRO-3 over {ranks}"),)
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
    cpu_kv_bytes: int | None = None,
    adapter: Adapter | None = None,
) -> Bytes:
    """A vLLM engine on one of its GPUs (or a CPU, with a cache of `cpu_kv_bytes`): it takes `utilization` of
    the GPU, and the cache gets what weights and temporaries leave. `adapter`: has buffers on every GPU.
    """
    of_adapter = adapter.parameters(shape) * size if adapter is not None else 0
    weights = shape.parameters * size // tensor_parallel
    working = (f"engine weights: {_count(shape.parameters)} x {size} B" + _divided(tensor_parallel, "GPUs"),)
    if cpu_kv_bytes is not None:
        held = {"weights": weights, "kv_cache": cpu_kv_bytes, "buffers": of_adapter}
        return Bytes(_positive(held), {}, working)
    temporaries = ENGINE_BATCH_TOKENS * _forward_numbers(shape) * size
    if shape.vision is not None:  # a batch of image tokens alone, before the language model reads them
        patches = ENGINE_BATCH_TOKENS * shape.vision.patches_per_token
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


def _divided(by: int, why: str) -> str:
    return f" / {by} ({why})" if by > 1 else ""


def _on_host(offloaded: bool) -> str:
    return ", in host memory" if offloaded else ""
