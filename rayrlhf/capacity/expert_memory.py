"""Memory of a layer's mixture of experts, in bytes per token. Pure.

transformers' grouped experts (`grouped_mm_experts_forward`) and ours with adapters copy each token's hidden
state once per expert that it is sent to, sorted by expert. With K experts of a token, of E in the layer, and
s bytes an element autograd keeps

    experts      K (2H + 4I) s    sorted inputs, gate and up, activation, product, outputs before weighting;
                                  frozen experts without adapters keep neither inputs nor products
    order        24 K             three permutations
    router       4E + K (8 + s)   probabilities in fp32, the chosen experts and their weights

The learner records E s + K (8 + s) of every layer for the balance loss and the load metrics, outside of what
gradient checkpointing recomputes.
"""

from __future__ import annotations

from rayrlhf.capacity.model_shape import ModelShape

INDEX = 8  # bytes


def kept_bytes(shape: ModelShape, size: int, *, trained: bool, rank: int) -> int:
    """`trained`: the experts' weights, or adapters of them with this `rank` (0: none)."""
    k, hidden, inner = shape.experts_per_token, shape.hidden, shape.intermediate
    learns = trained or rank > 0
    experts = k * ((1 + learns) * hidden + (3 + learns) * inner + 2 * rank) * size
    order = k * (3 * INDEX + size)
    router = 4 * shape.experts + k * (INDEX + 4)
    return experts + order + router + _shared_bytes(shape, size, trained=trained)


def _shared_bytes(shape: ModelShape, size: int, *, trained: bool) -> int:
    if not shape.shared_expert:
        return 0
    return ((3 + trained) * shape.shared_expert + shape.hidden + 1) * size


def recorded_bytes(shape: ModelShape, size: int) -> int:
    """Kept of a layer's decisions until the micro-batch ends."""
    return shape.experts * size + shape.experts_per_token * (INDEX + size)


def gradient_bytes(shape: ModelShape, size: int) -> int:
    """Temporary bytes of the backward pass beyond what it has freed: three of the sorted hidden states while
    the routing weights are differentiated, or gradients of two of an expert's inner activations.
    """
    k = shape.experts_per_token
    return k * max(3 * shape.hidden, 2 * shape.intermediate - shape.hidden) * size


def weight_gradient_bytes(shape: ModelShape, size: int) -> int:
    """Of all gate and up projections of a layer, before it is added to the accumulated one."""
    return 2 * shape.experts * shape.hidden * shape.intermediate * size


def forward_numbers(shape: ModelShape) -> int:
    """Temporary numbers of a forward pass without gradients, per token: sorted inputs, gate, up,
    activation and product; or inputs, and outputs before and after they are weighted and put back in order.
    """
    own = shape.experts_per_token * max(shape.hidden + 4 * shape.intermediate, 4 * shape.hidden)
    return own + 2 * shape.shared_expert
