"""`model`, `critic` and `ref`: the networks of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, NonNegativeNumber, PositiveNumber, Problem, Section, Wanted

Dtype = Literal["auto", "float32", "bfloat16"]


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """Folder of the actor's Hugging Face checkpoint, or a hub id: owner/name, or owner/name@revision."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto is bfloat16 on a GPU, float32 on a CPU (with bf16 products if faster)."""
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    """Attention kernel; auto: FlashAttention-2 where installed, else torch's varlen kernel; SDPA on CPUs."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the checkpoint; only for checkpoints whose code you have read."""

    @property
    def attention_kernel(self) -> str:
        return self.attention

    @property
    def compiles(self) -> bool:
        """Whether its decoder layers are compiled."""
        return False

    @property
    def has_liger(self) -> bool:
        """Whether its norms, rotations and gated MLPs are Liger's."""
        return False


ENGINE_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's buffers; it also takes 1


class LoraConfig(Section):
    rank: Count = 16
    """Rank r of each update B A; B starts at 0."""
    alpha: PositiveNumber = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), Wanted("a number >= 0 and < 1")] = 0.0
    """Share of an adapter's inputs that are dropped; 0 in policy runs."""
    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Last names of the linear layers to adapt, e.g. q_proj; null is all of them but the output head."""
    experts: bool = False
    """Adapt the experts of a mixture, too, each with its own A and B."""


def _experts_are_not_quantized(model: TrainedModelConfig) -> Problem | None:
    if model.quantization is None or model.lora is None or not model.lora.experts:
        return None
    return Problem(
        "lora.experts",
        got=f"true with quantization={model.quantization}",
        wanted="false: bitsandbytes quantizes linear layers, not the stacked weights of experts",
        fix="remove model.lora.experts or model.quantization",
    )


def _quantized_weights_are_frozen(model: TrainedModelConfig) -> Problem | None:
    if model.quantization is None or model.lora is not None:
        return None
    return Problem(
        "quantization",
        got=f"{model.quantization} without model.lora",
        wanted="adapters: they are trained instead of the 4-bit weights",
        fix="give model.lora, or remove model.quantization",
    )


def _sequences_are_shared_with_sdpa(model: TrainedModelConfig) -> Problem | None:
    if model.sequence_parallel == 1 or model.attention != "flash_attention_2":
        return None
    return Problem(
        "attention",
        got=f"flash_attention_2 with sequence_parallel={model.sequence_parallel}",
        wanted="auto or sdpa: attention to the tokens of other ranks uses SDPA's kernels",
        fix="remove model.attention, or set model.sequence_parallel to 1",
    )


def _fused_once(model: TrainedModelConfig) -> Problem | None:
    if not model.compile or model.kernels == "none":
        return None
    return Problem(
        "kernels",
        got=f"{model.kernels} with compile=true",
        wanted="one of the two: both fuse the same operations",
        fix="remove model.kernels or model.compile",
    )


class TrainedModelConfig(ModelConfig):
    lora: LoraConfig | None = None
    """Train low-rank adapters (arXiv 2106.09685) on a frozen model; null trains all weights."""

    quantization: Literal["nf4"] | None = None
    """Keep the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); engines get dequantised ones."""

    aux_loss_coef: NonNegativeNumber = 0.0
    """Weight of a mixture of experts' load-balancing loss, e.g. 0.001; 0 is none."""
    freeze_vision: bool = False
    """Keep the vision tower of a vision-language model as it is; adapters never are in it."""

    compile: bool = False
    """Compile each decoder layer with torch.compile: fewer, fused kernels, after a minute of compilation."""
    kernels: Literal["none", "liger"] = "none"
    """Fused kernels of norms, rotations and gated MLPs on CUDA GPUs: liger (the package liger-kernel)."""
    sequence_parallel: Count = 1
    """Neighbouring workers that split the tokens of each micro-batch; for sequences too long for one."""

    checks = (
        _quantized_weights_are_frozen,
        _experts_are_not_quantized,
        _sequences_are_shared_with_sdpa,
        _fused_once,
    )

    @property
    def attention_kernel(self) -> str:
        return self.attention if self.sequence_parallel == 1 else "sdpa"

    @property
    def compiles(self) -> bool:
        return self.compile

    @property
    def has_liger(self) -> bool:
        return self.kernels == "liger"

    @property
    def loads_in_parts(self) -> bool:
        """Whether ZeRO-3 may partition weights while they are loaded: NF4 is made from whole tensors."""
        return self.quantization is None

    def holds_reference(self, path: str | None) -> bool:
        """Whether the reference is this model with its adapters off; `path`: the reference checkpoint."""
        return self.lora is not None and path is None


def reference_is_quantized(model: TrainedModelConfig, key: str, got: str) -> Problem:
    """The problem of a reference that is a dense copy of the model trained in 4 bits.

    Args:
        key: the setting that asks for it.
        got: its value.
    """
    return Problem(
        key,
        got=f"{got} with model.quantization={model.quantization}",
        wanted="the model itself with its adapters off, in the same 4 bits: a dense copy is another model, "
        "from which the policy differs before its first step (KL > 0)",
        fix=f"remove {key}",
    )


def sequences_are_shared(model: TrainedModelConfig, num_workers: int, key: str) -> Problem | None:
    """A problem unless `num_workers`, the value of `key`, is a multiple of model.sequence_parallel."""
    if num_workers % model.sequence_parallel == 0:
        return None
    return Problem(
        "model.sequence_parallel",
        got=f"{model.sequence_parallel} with {key}={num_workers}",
        wanted=f"a divisor of {key}: groups of that many workers split their sequences",
        fix=f"set {key} to a multiple of {model.sequence_parallel}, or lower model.sequence_parallel",
    )


def compiled_weights_are_whole(model: TrainedModelConfig, zero_stage: int) -> Problem | None:
    """A problem if compiled layers would have partitioned weights."""
    if not model.compile or zero_stage < 3:
        return None
    return Problem(
        "model.compile",
        got=f"true with train.zero_stage={zero_stage}",
        wanted="false: ZeRO-3 gathers and releases the weights of each module in hooks, which would split a "
        "compiled layer at every module",
        fix="set train.zero_stage to 2, or remove model.compile",
    )


class CriticConfig(Section):
    path: str | None = None
    """Folder or hub id to start the critic from (language or reward model); the actor's when left out."""
    lr: NonNegativeNumber = 1e-5
    """Learning rate of the critic; its schedule, warm-up and optimizer are those of `train`."""
    value_clip: PositiveNumber | None = 0.2
    """How far a value may move from the old one before its loss is clipped; null switches it off."""
    location: Literal["auto", "worker", "trainer"] = "auto"
    """In the actor's workers, or in a separate trainer; auto: worker where both share slots."""
    num_workers: Count | None = None
    """Workers of a critic in a separate trainer; train.num_workers when left out."""


def _engine_serves(ref: RefConfig) -> Problem | None:
    if ref.engine == "vllm" or ref.tensor_parallel == 1:
        return None
    return Problem(
        "tensor_parallel",
        got=f"{ref.tensor_parallel} with engine={ref.engine}",
        wanted="1: only a vLLM engine splits a reference over several GPUs",
        fix="set ref.engine to vllm, or remove ref.tensor_parallel",
    )


class RefConfig(Section):
    path: str | None = None
    """Folder or hub id of the reference policy; the actor's when left out."""
    location: Literal["auto", "worker", "serve", "adapters_off"] = "auto"
    """A copy in every worker, behind Serve, or the actor without its adapters; auto takes the cheapest."""
    num_replicas: Count = 1
    """Serve replicas of a reference that is served."""
    engine: Literal["packed", "vllm"] = "packed"
    """Backend of a served reference: a packed forward pass, or vLLM, which can split it over several GPUs."""
    tensor_parallel: Count = 1
    """GPUs of each replica (with engine: vllm)."""

    checks = (_engine_serves,)
