"""Loads policy, critic, reward models and tokenizer from a checkpoint folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from rayrlhf.config.model import ModelConfig, TrainedModelConfig
from rayrlhf.hub.local import local_folder
from rayrlhf.models.activation_offload import offload_activations
from rayrlhf.models.attention import attention_implementation, has_chunks
from rayrlhf.models.cpu_products import Products, cast_linear_layers, use_fastest_products
from rayrlhf.models.distill import DistillModel, TeacherModel
from rayrlhf.models.heads import ScoreModel, StepModel, ValueModel
from rayrlhf.models.logprobs import PolicyModel, logit_scaling
from rayrlhf.models.probe import Head, rope_limits, verdict_of
from rayrlhf.models.streams import M, Streams, with_streams
from rayrlhf.models.vision import VisionInputs, freeze_tower, is_vision_language, vision_attention


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, of which `choose_products` may round factors."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_products(config: ModelConfig, path: str, device: torch.device) -> Products | None:
    """Set how this process multiplies fp32 matrices; None where the weights are not fp32 by `auto`."""
    if config.dtype != "auto" or device.type != "cpu":
        return None
    return use_fastest_products(_architecture(config, path))


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        local_folder(path, weights=False), trust_remote_code=trust_remote_code
    )


def load_policy(config: ModelConfig, path: str, *, device: torch.device, chunk_tokens: int) -> PolicyModel:
    """The actor or the reference, in training mode (`from_pretrained` alone leaves a model in eval mode)."""
    setup = _load_setup(config, path, device)
    vision = VisionInputs.of(path, trust_remote_code=config.trust_remote_code)
    kind = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    policy = PolicyModel(kind.from_pretrained(local_folder(path), **setup.options), chunk_tokens=chunk_tokens)
    policy.vision = vision
    return setup.prepare(policy).train()


def load_student(
    config: ModelConfig,
    path: str,
    *,
    device: torch.device,
    chunk_tokens: int,
    divergence: str,
    beta: float = 0.5,
) -> DistillModel:
    """A language model to distil into, in training mode; `divergence` is one of `DISTILL_LOSSES`."""
    setup = _load_setup(config, path, device)
    causal_lm = AutoModelForCausalLM.from_pretrained(local_folder(path), **setup.options)
    student = DistillModel(causal_lm, chunk_tokens=chunk_tokens, divergence=divergence, beta=beta)
    return setup.prepare(student).train()


def load_teacher(config: ModelConfig, path: str, *, device: torch.device, chunk_tokens: int) -> TeacherModel:
    """A language model to distil from: frozen and in eval mode."""
    setup = _load_setup(config, path, device)
    causal_lm = AutoModelForCausalLM.from_pretrained(local_folder(path), **setup.options)
    return setup.prepare(TeacherModel(causal_lm, chunk_tokens=chunk_tokens))


def load_critic(config: ModelConfig, path: str, *, device: torch.device) -> ValueModel:
    """A critic from a language model (a new head, all values 0) or from a reward model (its score head)."""
    decoder, head, setup = _decoder_and_head(config, path, device)
    critic = ValueModel(decoder, head)
    critic.vision = VisionInputs.of(path, trust_remote_code=config.trust_remote_code)
    return setup.prepare(critic).train()


def load_scorer(config: ModelConfig, path: str, *, device: torch.device) -> ScoreModel:
    """A decoder-style reward model (`AutoModelForSequenceClassification`, one label), in eval mode."""
    decoder, head, setup = _decoder_and_head(config, path, device)
    return setup.prepare(ScoreModel(decoder, head)).eval()


def load_reward_model(config: ModelConfig, path: str, *, device: torch.device) -> ScoreModel:
    """A reward model to train, from a language model (a new head, all scores 0) or from a reward model.

    Raises `ValueError` if transformers has no classifier for the export.
    """
    if not has_packed_scorer(path, trust_remote_code=config.trust_remote_code):
        raise ValueError(
            f"{path}: transformers has no decoder-style sequence classifier for this architecture, "
            "so a reward model made from it could not be exported; choose another checkpoint"
        )
    decoder, head, setup = _decoder_and_head(config, path, device)
    return setup.prepare(ScoreModel(decoder, head)).train()


def load_step_model(
    config: ModelConfig, path: str, *, device: torch.device, reward_token_ids: tuple[int, int] | None = None
) -> StepModel:
    """A process reward model to train, from a language model or from a token classifier with two labels.

    From a language model with `reward_token_ids` (bad, good), its initial logits are the language model's
    logits of these two tokens; without them, all are 0. A classifier keeps its head. Raises `ValueError` if
    transformers has no token classifier for the export, for another number of labels, and for logits that are
    not a linear function of the hidden states.
    """
    found = AutoConfig.from_pretrained(
        local_folder(path, weights=False), trust_remote_code=config.trust_remote_code
    )
    classifier: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(found), None)
    if classifier is None or not issubclass(classifier, GenericForTokenClassification):
        raise ValueError(
            f"{path}: transformers has no decoder-style token classifier for this architecture, "
            "so a process reward model made from it could not be exported; choose another checkpoint"
        )
    setup = _load_setup(config, path, device, head="values")
    if _is_made_for(path, "ForTokenClassification", trust_remote_code=config.trust_remote_code):
        model = AutoModelForTokenClassification.from_pretrained(local_folder(path), **setup.options)
        if model.config.num_labels != 2:
            raise ValueError(
                f"{path} has {model.config.num_labels} labels; "
                "a process reward model needs exactly 2, (bad, good)"
            )
        return setup.prepare(StepModel(model.base_model, model.score)).train()
    if reward_token_ids is None:
        decoder = AutoModel.from_pretrained(local_folder(path), **setup.options)
        return setup.prepare(StepModel(decoder, _zero_step_head(decoder))).train()
    causal_lm = AutoModelForCausalLM.from_pretrained(local_folder(path), **setup.options)
    model = StepModel(causal_lm.base_model, step_head_of(causal_lm, reward_token_ids))
    return setup.prepare(model).train()


def adapt(config: TrainedModelConfig, model: Any, *, device: torch.device, seed: int) -> None:
    """Add the configured adapters to a decoder or language model, which is then frozen, and optionally
    quantized to 4 bits on the `device`.
    """
    if config.quantization is not None:
        from rayrlhf.models.quantize import quantize  # imports bitsandbytes

        quantize(model, device)
    if config.lora is not None:
        from rayrlhf.models.lora import add_adapters  # imports PEFT, which takes a second

        add_adapters(model, config.lora, seed=seed)
    elif config.freeze_vision and is_vision_language(model.config):
        freeze_tower(model)


def is_sequence_classifier(path: str, *, trust_remote_code: bool = False) -> bool:
    return _is_made_for(path, "ForSequenceClassification", trust_remote_code=trust_remote_code)


def checkpoint_activations(model: Any, *, offload: bool = False) -> None:
    """Activation checkpointing: store only each layer's input, recompute the rest in the backward pass.

    Args:
        offload: keep these inputs in host memory. Raises `ValueError` like `offload_activations`.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        offload_activations(model)


def has_packed_scorer(path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether this checkpoint's classifier is a decoder with a `score` head, which supports packing."""
    config = AutoConfig.from_pretrained(
        local_folder(path, weights=False), trust_remote_code=trust_remote_code
    )
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return classifier is not None and issubclass(classifier, GenericForSequenceClassification)


def _decoder_and_head(
    config: ModelConfig, path: str, device: torch.device
) -> tuple[nn.Module, nn.Linear, LoadSetup]:
    setup = _load_setup(config, path, device, head="values")
    if is_sequence_classifier(path, trust_remote_code=config.trust_remote_code):
        model = AutoModelForSequenceClassification.from_pretrained(local_folder(path), **setup.options)
        if model.config.num_labels != 1:
            raise ValueError(
                f"{path} has {model.config.num_labels} labels; a reward model or critic needs exactly 1"
            )
        return model.base_model, model.score, setup
    decoder = AutoModel.from_pretrained(local_folder(path), **setup.options)
    head = nn.Linear(
        decoder.config.get_text_config().hidden_size, 1, bias=False, dtype=setup.options["dtype"]
    )
    nn.init.zeros_(head.weight)
    return decoder, head, setup


def _zero_step_head(decoder: Any) -> nn.Linear:
    """A zero head with a bias, which transformers' token classifiers have by default."""
    bias = getattr(decoder.config, "token_classification_bias", True)
    head = nn.Linear(decoder.config.get_text_config().hidden_size, 2, bias=bias, dtype=decoder.dtype)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def step_head_of(causal_lm: Any, reward_token_ids: tuple[int, int]) -> nn.Linear:
    """The rows of the output projection for the tokens (bad, good)."""
    scaling = logit_scaling(causal_lm.config)
    projection: Any = causal_lm.get_output_embeddings()
    rows, (bad, good) = list(reward_token_ids), reward_token_ids
    if bad == good or not all(0 <= row < projection.out_features for row in rows):
        raise ValueError(
            f"reward tokens (bad, good) have the ids {reward_token_ids}; wanted two different ones "
            f"below {projection.out_features}"
        )
    head = _zero_step_head(causal_lm)
    if scaling.softcap is not None or (projection.bias is not None and head.bias is None):
        raise ValueError(
            "this language model's logits are not a linear function of its hidden states, so a token "
            "classifier cannot be initialised from them; omit the reward tokens"
        )
    head.weight.copy_(projection.weight[rows] * scaling.slope)
    if projection.bias is not None:
        head.bias.copy_(projection.bias[rows] * scaling.slope)
    return head


def _is_made_for(path: str, suffix: str, *, trust_remote_code: bool) -> bool:
    architectures = (
        AutoConfig.from_pretrained(
            local_folder(path, weights=False), trust_remote_code=trust_remote_code
        ).architectures
        or []
    )
    return any(name.endswith(suffix) for name in architectures)


class LoadSetup(NamedTuple):
    """How a model is loaded and computed in this process."""

    streams: Streams
    casts: bool  # whether its linear layers cast the factors of their products
    options: dict[str, Any]  # of `from_pretrained`
    compiles: bool  # whether its decoder layers are compiled
    has_liger: bool  # whether its norms, rotations and gated MLPs are Liger's

    def prepare(self, model: M) -> M:
        """Apply it to the loaded model; returns the model."""
        if self.casts:
            cast_linear_layers(model)
        if self.has_liger:
            from rayrlhf.models.liger import apply_liger

            apply_liger(model.causal_lm if hasattr(model, "causal_lm") else model.decoder)
        if self.compiles:
            from rayrlhf.models.compiled_layers import compile_layers

            compile_layers(model)
        return with_streams(model, self.streams)


def _load_setup(config: ModelConfig, path: str, device: torch.device, *, head: Head = "policy") -> LoadSetup:
    """How the model is loaded and computed correctly. Raises `ValueError` if it cannot be."""
    products = choose_products(config, path, device)
    found = _architecture(config, path)
    # For any length: the driver has checked the run's lengths (runtime.architecture_checks).
    verdict = verdict_of(found, longest=0, head=head, trust_remote_code=config.trust_remote_code)
    if verdict.streams is None:
        raise ValueError(f"{path}: {verdict.reason}; choose another model")
    streams = verdict.streams
    if config.compiles:
        _check_compiled(path, streams, device)
    if config.has_liger:
        from rayrlhf.models.liger import check_liger

        check_liger(found, device)
    limits = [limit for _, limit in rope_limits(found)]
    if streams.is_packed and limits:
        streams = Streams(longest_packed=min(limits))
    kernel = config.attention_kernel
    if has_chunks(found):  # FlashAttention's kernels do not support chunks
        kernel = "sdpa"
    attention = streams.attention or attention_implementation(kernel, device)
    options = {
        "dtype": resolve_dtype(config.dtype, device),
        "attn_implementation": vision_attention(attention) if is_vision_language(found) else attention,
        "trust_remote_code": config.trust_remote_code,
    }
    casts = products is not None and products.casts
    return LoadSetup(streams, casts, options, config.compiles, config.has_liger)


def _check_compiled(path: str, streams: Streams, device: torch.device) -> None:
    """Raises `ValueError` if this model's layers, or none on this machine, can be compiled."""
    from rayrlhf.models.compiled_layers import check_compiler

    check_compiler(on_gpu=device.type == "cuda")
    if not streams.is_packed:
        raise ValueError(
            f"compile=true with {path}: its layers mix tokens in ways of their own, which would be compiled "
            "for every length again; set model.compile (of a reward model: its source's compile) to false"
        )


def _architecture(config: ModelConfig, path: str) -> Any:
    folder = local_folder(path, weights=False)
    return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
