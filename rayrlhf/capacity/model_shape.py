"""Dimensions and exact parameter counts of a decoder, from its `config.json`. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.capacity.vision_tower import VisionTower, tower_of
from rayrlhf.hub.ids import PREFIX, cache_folder, parse_id, snapshot_folder

KNOWN_SHAPES = Path(__file__).with_name("shapes.json")


class ShapeUnknown(ValueError):
    """The shape of a model is unknown; the message says what to do."""


@dataclass(frozen=True)
class Family:
    """How a model type differs from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's query and key
    norms_per_layer: int = 2
    has_experts: bool = False
    expert_size_key: str = "intermediate_size"
    has_shared_expert: bool = False  # that every token passes, weighted by a gate
    tied: bool = False  # default of its config class


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms_per_layer=4, tied=True),
    "gemma3_text": Family(norms_per_layer=4, qk_norm=True, tied=True),
    "qwen2_5_vl": Family(qkv_bias=True),
    "qwen2_5_vl_text": Family(qkv_bias=True),
    "mixtral": Family(has_experts=True),
    "qwen2_moe": Family(
        qkv_bias=True, has_experts=True, expert_size_key="moe_intermediate_size", has_shared_expert=True
    ),
    "qwen3_moe": Family(qk_norm=True, has_experts=True, expert_size_key="moe_intermediate_size"),
}


@dataclass(frozen=True)
class ModelShape:
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the dense layer, or of one expert
    vocabulary: int
    tied: bool
    family: Family = Family()
    experts: int = 0  # 0 = dense
    experts_per_token: int = 0
    shared_expert: int = 0  # intermediate size of the expert that all tokens pass; 0 = none
    dense_layers: int = 0  # of a mixture of experts, without experts
    dense_intermediate: int = 0  # of these layers
    attention_bias: bool = False  # of the output projection too
    mlp_bias: bool = False
    vision: VisionTower | None = None

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def attention_matrices(self) -> int:
        """Elements of a layer's four projections."""
        return self.hidden * (2 * self.query_size + 2 * self.kv_size)

    @property
    def mlp_matrices(self) -> int:
        """Elements of a layer's gate, up and down projections, of all experts."""
        return 3 * self.hidden * (self.intermediate * max(1, self.experts) + self.shared_expert)

    @property
    def layer_parameters(self) -> int:
        """Of a layer; in a mixture of experts, of one with experts."""
        biases = (self.query_size + 2 * self.kv_size) * (self.family.qkv_bias or self.attention_bias)
        biases += self.hidden * self.attention_bias
        biases += (2 * self.intermediate + self.hidden) * self.mlp_bias
        norms = self.family.norms_per_layer * self.hidden + 2 * self.head_dim * self.family.qk_norm
        router = self.hidden * (self.experts + self.family.has_shared_expert)
        return self.attention_matrices + self.mlp_matrices + biases + norms + router

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Elements of the language model's matrices, with those of the head and without experts."""
        of_all = self.layers * self.attention_matrices + self.embedding_parameters
        if not self.experts:
            return of_all + self.layers * self.mlp_matrices
        dense = self.dense_layers * self.dense_intermediate + self.expert_layers * self.shared_expert
        return of_all + 3 * self.hidden * dense

    @property
    def vision_parameters(self) -> int:
        return self.vision.parameters if self.vision is not None else 0

    @property
    def decoder_parameters(self) -> int:
        """Parameters without the output projection, with those of a vision tower."""
        dense = 3 * self.hidden * self.dense_intermediate - (self.layer_parameters - self._without_mlp)
        layers = self.layers * self.layer_parameters + self.dense_layers * dense
        return self.embedding_parameters + layers + self.hidden + self.vision_parameters

    @property
    def _without_mlp(self) -> int:
        """Parameters of a layer but for its MLP or its experts, their router and the shared expert's gate."""
        router = self.hidden * (self.experts + self.family.has_shared_expert)
        return self.layer_parameters - self.mlp_matrices - router

    @property
    def parameters(self) -> int:
        """Parameters of the language model, with those of a vision tower."""
        return self.decoder_parameters + (0 if self.tied else self.embedding_parameters)

    @property
    def scorer_parameters(self) -> int:
        """Parameters of a critic or reward model: the decoder and a head with one output."""
        return self.decoder_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters used per token of text: of the experts only those that it is routed to."""
        text = self.parameters - self.vision_parameters
        if not self.experts:
            return text
        idle = 3 * self.hidden * self.intermediate * (self.experts - self.experts_per_token)
        return text - self.expert_layers * idle


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape from the contents of a `config.json`. Raises `ShapeUnknown` for an unknown architecture."""
    whole, config = config, config.get("text_config") or config
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ShapeUnknown(
            f"{name}: unknown model_type {kind!r}; known are {', '.join(FAMILIES)} "
            "(to add one, extend FAMILIES in rayrlhf/capacity/model_shape.py)"
        )
    family = FAMILIES[kind]
    heads = config["num_attention_heads"]
    return ModelShape(
        name=name,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config[family.expert_size_key],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", whole.get("tie_word_embeddings", family.tied)),
        family=family,
        experts=_experts(config) if family.has_experts else 0,
        experts_per_token=config["num_experts_per_tok"] if family.has_experts else 0,
        shared_expert=config["shared_expert_intermediate_size"] if family.has_shared_expert else 0,
        dense_layers=_dense_layers(config) if family.has_experts else 0,
        dense_intermediate=config["intermediate_size"] if family.has_experts else 0,
        attention_bias=bool(config.get("attention_bias", False)) and not family.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        vision=tower_of(whole["vision_config"]) if kind.startswith("qwen2_5_vl") else None,
    )


def _dense_layers(config: Mapping[str, Any]) -> int:
    """Qwen's mixtures may name layers without experts, and have experts in every n-th layer only."""
    named, every = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return sum(layer in named or (layer + 1) % every != 0 for layer in range(config["num_hidden_layers"]))


def _experts(config: Mapping[str, Any]) -> int:
    """Configs use either key, even within one family."""
    return config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]


def read_shape(path: str) -> ModelShape:
    """The shape of a checkpoint folder, of a hub id (owner/name, or with @revision) whose config.json is in
    the local cache, or of a well-known id (shapes.json).

    Raises `ShapeUnknown`.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        file = cached_config(path) or file
        path = path.removeprefix(PREFIX).partition("@")[0]
    if file.is_file():
        try:
            return shape_of(json.loads(file.read_text(encoding="utf-8")), path)
        except ShapeUnknown:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ShapeUnknown(
                f"{path}: its config.json cannot be read ({reason}); download it again"
            ) from error
    known: dict[str, Any] = json.loads(KNOWN_SHAPES.read_text(encoding="utf-8"))
    for entry in known["shapes"]:
        if path in entry["names"]:
            return shape_of(entry["config"], path)
    raise ShapeUnknown(
        f"{path}: no config.json there, in the hub's local cache, or in the list of well-known models; "
        "download the model's config.json into a folder and give that folder"
    )


def cached_config(path: str) -> Path | None:
    """The cached `config.json` of a hub id: that of its revision if it names one or the cache knows the
    default one, else the newest.
    """
    hub_id = parse_id(path)
    if isinstance(hub_id, str):
        return None
    cache = cache_folder(os.environ)
    snapshot = snapshot_folder(cache, hub_id)
    if snapshot is not None and (snapshot / "config.json").is_file():
        return snapshot / "config.json"
    if hub_id.revision is not None:
        return None
    found = cache.glob(f"{hub_id.cache_name}/snapshots/*/config.json")
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def config_folder(path: str) -> str:
    """The local folder with a model's config.json, or an empty string."""
    if Path(path, "config.json").is_file():
        return path
    file = cached_config(path)
    return "" if file is None else str(file.parent)
