"""What autograd keeps of a micro-batch, in bytes. Pure arithmetic.

What autograd keeps was counted from the tensors that transformers' decoders save with packed sequences, and
agrees with torch's allocator (benchmarks/planner.py). Per token of a layer, s bytes an element:

    two RMSNorms      2 (4 + 2s) H    the input in fp32, the normalised input, the output
                                      (in fp32 the first is no copy, which comes to the same 12 H)
    attention         c A D s + 2 K D s + 4 A
                                      queries, output, keys and values after their rotation, log-sum-exp;
                                      c = 2, or 3 where the output is copied to another layout (SDPA on
                                      a CPU)
    gated MLP         4 I s           gate, its activation, up, their product (experts: expert_memory)

and outside the layers (4 + 2s) H + s H for the last norm, and 2 D s of cosines and sines. With gradient
checkpointing a layer keeps its input, s H, and one layer at a time is recomputed. With Liger's kernels a norm
keeps 2 s H, and a gated MLP 3 I s. Compiled layers keep less, and are counted as if they were not compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayrlhf.capacity import expert_memory
from rayrlhf.capacity.model_shape import ModelShape

ON_DEVICE = 2  # inputs of layers on the device, where they are offloaded


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
        gate_up, down = shape.hidden + 2 * shape.intermediate, shape.intermediate + shape.hidden
        experts = shape.expert_layers * shape.experts * (gate_up + down) if self.experts else 0
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
    liger: bool = False  # Liger's norms and gated MLPs


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
        mlp = (3 if precision.liger else 4) * shape.intermediate * s
    return norms + attention + mlp + (adapter.between(shape) * s if adapter is not None else 0)


def _dense_layer_saves(shape: ModelShape, size: int, adapter: Adapter | None) -> int:
    """Bytes by which a layer without experts keeps less than the others of its model."""
    rank = adapter.rank if adapter is not None and adapter.experts else 0
    experts = expert_memory.kept_bytes(shape, size, trained=adapter is None, rank=rank)
    return experts - (4 if adapter is None else 3) * shape.dense_intermediate * size


def _kept_by_norm(precision: Precision, adapter: Adapter | None) -> int:
    """Bytes per element: the input in fp32, the normalised input if the norm is trained, the output. Liger's
    norms keep the input as it is, and the output.
    """
    if precision.liger:
        return 2 * precision.weights
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
    offloaded: int = 0  # layers whose inputs are in host memory; not in `layers`
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

    def input_bytes(self, tokens: int, ranks: int, *, pinned: bool) -> int:
        """Of a layer whose input is in host memory. torch's allocator of pinned memory rounds up to powers of
        two.
        """
        size = max(1, tokens // ranks * self.kept)
        return 1 << (size - 1).bit_length() if pinned else size

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
    offload: bool = False,
    adapter: Adapter | None = None,
    has_balance_loss: bool = False,
    freeze_vision: bool = False,
    image_tokens: int = 0,
) -> Activations:
    """`image_tokens`: of a micro-batch, each of a different image. With `offload`, the device holds the input
    of the last layer, or of the one that is recomputed, and one on its way.
    """
    s, layer = precision.weights, layer_activation_bytes(shape, precision, adapter)
    found = Activations(
        layers=min(shape.layers, ON_DEVICE) if offload else shape.layers,
        offloaded=shape.layers - 1 if offload else 0,
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


def activation_terms(kept: Activations, tokens: int, ranks: int) -> str:
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
    if kept.offloaded:
        terms[0] += " here"
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
        shared = f"{per_token}{divided(ranks, 'ranks of a sequence')}"
        formula = f"{tokens:,} tokens x ({shared} + {layers} x {gathered:,} B of keys and values)"
    if in_layer > at_the_head and kept.weight_gradient:
        formula += f" + {kept.weight_gradient:,} B of a gradient of experts"
    return formula + (f" + {tower}" if tower else "")


def divided(by: int, why: str) -> str:
    return f" / {by} ({why})" if by > 1 else ""
