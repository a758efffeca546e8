"""Memory budget of a job: bytes of every role on its slots, and whether they fit. Pure.

If engines sleep while trainers work (hybrid engine), the peak of a slot is that of its fullest phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayrlhf.capacity import memory
from rayrlhf.capacity.activations import Adapter, Precision
from rayrlhf.capacity.attention_heads import split_problems
from rayrlhf.capacity.gpu_types import GIB, Gpu
from rayrlhf.capacity.memory import Bytes
from rayrlhf.capacity.model_shape import ModelShape, ShapeUnknown, read_shape
from rayrlhf.config.adapter_push import why_adapters_are_merged
from rayrlhf.config.base import ConfigError
from rayrlhf.config.model import ENGINE_LORA_RANKS, LoraConfig, TrainedModelConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.rollout import GPU_BATCH_TOKENS
from rayrlhf.config.supervised import SupervisedConfig
from rayrlhf.placement.plan import PlacementSpec, kind_of, plan_job

STATES = ("weights", "gradients", "optimizer", "buffers")
PUBLICATIONS = 2  # of the weights in the object store: engines may still read the old ones
PHASES = ("training", "weight sync", "rollout")
SCORERS = ("rm", "prm")  # jobs whose model has no language-model head


@dataclass(frozen=True)
class WhatIf:
    """Hypothetical training settings of a plan; None keeps the config's."""

    lora_rank: int | None = None
    quantized: bool = False  # QLoRA: frozen projections in 4 bits
    sequence_parallel: int | None = None

    def applied(self, config: Any) -> Any:
        """`config` with these settings, if it trains a model."""
        model = config.model
        if not isinstance(model, TrainedModelConfig):
            return config
        if self.lora_rank is not None:
            model = model.model_copy(update={"lora": LoraConfig(rank=self.lora_rank)})
        if self.quantized:
            changes = {"lora": model.lora or LoraConfig(), "quantization": "nf4"}
            model = model.model_copy(update=changes)
        if self.sequence_parallel is not None:
            model = model.model_copy(update={"sequence_parallel": self.sequence_parallel})
        return config.model_copy(update={"model": model})


@dataclass(frozen=True)
class Budget:
    spec: PlacementSpec
    roles: Mapping[str, Bytes]  # per slot
    phases: Mapping[str, tuple[int, ...]]  # bytes of every slot; one phase, "always", if nothing sleeps
    host_bytes: tuple[int, ...]  # of every slot
    gpu: Gpu | None
    kv_bytes_per_token: int | None = None
    published_bytes: int = 0  # of the weights on their way to the engines, once

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Peak bytes of every slot."""
        return tuple(max(sizes) for sizes in zip(*self.phases.values(), strict=True))

    @property
    def fits(self) -> bool | None:
        """None if the GPUs are unknown."""
        return None if self.gpu is None else max(self.peak_bytes) <= self.gpu.usable_bytes

    @property
    def tokens_in_flight(self) -> int | None:
        """Prompts and responses that the cache of one engine holds at once."""
        cache = self.roles["rollout"].device.get("kv_cache") if "rollout" in self.roles else None
        return cache // self.kv_bytes_per_token if cache and self.kv_bytes_per_token else None


@dataclass
class _Shapes:
    """Cache of model shapes by path."""

    read: dict[str, ModelShape] = field(default_factory=dict)

    def of(self, path: str) -> ModelShape:
        if path not in self.read:
            self.read[path] = read_shape(path)
        return self.read[path]


def budget_lines(config: Any, *, on_gpu: bool) -> Iterator[str]:
    """A line per role, or the reason why there is no memory plan."""
    placement = config.placement.model_copy(update={"gpus_per_slot": int(on_gpu)})
    try:
        budget = budget_of(config.model_copy(update={"placement": placement}))
    except ShapeUnknown as unknown:
        yield f"no memory plan: {unknown}"
        return
    for plan in budget.spec.roles:
        held = budget.roles[plan.role]
        parts = ", ".join(f"{kind.replace('_', ' ')} {_amount(size)}" for kind, size in held.device.items())
        if held.total:
            yield f"plan: {plan.role} x {len(plan.units)} holds {_amount(held.total)} per slot: {parts}"


def _amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{max(1, size >> 20)} MiB"


def budget_of(config: Any, *, gpu: Gpu | None = None, what_if: WhatIf | None = None) -> Budget:
    """The budget of a job with slots; on CPUs if neither `gpu` nor placement.gpus_per_slot=1 is given.

    Raises `ShapeUnknown` and `ConfigError`.
    """
    what_if = what_if or WhatIf()
    config = what_if.applied(config)
    spec = plan_job(config)
    on_gpu = gpu is not None or config.placement.gpus_per_slot == 1
    dtype = config.model.dtype
    size = 4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2
    precision = Precision(size, on_gpu, liger=config.model.has_liger)
    shapes = _Shapes()
    if split := list(split_problems(config, shapes.of)):
        raise ConfigError(split)
    published = 0
    if isinstance(config, PolicyRunConfig):
        roles, published = _policy_roles(config, shapes, precision, gpu)
    elif isinstance(config, SupervisedConfig):
        roles = _supervised_roles(config, shapes, precision)
    else:
        roles = _generation_roles(config, shapes, precision, gpu)
    # On CPUs trainers are not offloaded.
    sleeps = on_gpu and isinstance(config, PolicyRunConfig) and config.engines_sleep(on_gpu=on_gpu)
    offloads = sleeps and config.train.offload_weights_between
    if sleeps:
        kinds = ("optimizer", "weights") if offloads else ("optimizer",)
        roles = {role: _with_sleeping_states(role, each, kinds) for role, each in roles.items()}
    kv = None
    if "rollout" in roles:
        width = spec.of("rollout").width
        kv_size = 1 if config.rollout.cache_is_fp8 else size  # pyright: ignore[reportAttributeAccessIssue]
        kv = memory.kv_bytes_per_token(shapes.of(config.model.path), kv_size, width)
    return Budget(
        spec=spec,
        roles=roles,
        phases=_phases(spec, roles, sleeps=sleeps, offloads_weights=offloads),
        host_bytes=_host_bytes(spec, roles, published),
        published_bytes=published,
        gpu=gpu,
        kv_bytes_per_token=kv,
    )


def _policy_roles(
    config: PolicyRunConfig, shapes: _Shapes, precision: Precision, gpu: Gpu | None
) -> tuple[dict[str, Bytes], int]:
    """Of every role, and of one publication of the weights."""
    train, shape = config.train, shapes.of(config.model.path)
    actor = memory.trainer(
        shape,
        train,
        precision,
        num_workers=train.num_workers,
        name="actor",
        adapter=_adapter(config),
        **_model_settings(config),
        image_tokens=_image_tokens(config, shape),
    )
    roles: dict[str, Bytes] = {}
    if config.needs_critic and config.critic is not None:
        is_separate = config.critic_is_separate
        critic_shape = shapes.of(config.critic.path or config.model.path)
        critic = memory.trainer(
            critic_shape,
            train,
            precision,
            num_workers=config.num_critic_workers if is_separate else train.num_workers,
            name="critic",
            adapter=_adapter(config),
            **_model_settings(config),
            has_head=False,
            image_tokens=_image_tokens(config, critic_shape),
        )
        if is_separate:
            roles["critic"] = critic
        else:
            actor = _alternating(actor, critic)
    if config.needs_ref and config.ref is not None and not config.ref_is_the_actor:
        ref_shape = shapes.of(config.ref.path or config.model.path)
        if config.ref_is_served:
            roles["ref"] = _served_ref(config, ref_shape, precision, gpu)
        else:
            ranks = train.num_workers if train.zero_stage == 3 else 1
            actor += memory.frozen(ref_shape, precision, name="ref", ranks=ranks)
    if config.algorithm.ema_beta is not None:
        adapter = _adapter(config)
        averaged = shape.parameters if adapter is None else adapter.parameters(shape)
        actor += Bytes({}, {"average": averaged * 4 // train.num_workers})
    travelling = _travelling_adapter(config, shape)
    pushed = shape.parameters
    if travelling is not None and not travelling.quantized:
        pushed = travelling.parameters(shape)  # of a quantised model the base is sent too, once
    published = pushed * precision.weights
    engine = _engine(config, shape, precision, gpu, travelling)
    if travelling is not None:
        engine += Bytes({}, {"adapter": travelling.parameters(shape) * precision.weights})
        if precision.on_gpu and config.engines_sleep(on_gpu=True):
            # Pushes are of adapters alone, so a sleeping engine keeps the base in host memory.
            engine += Bytes({}, {"sleeping weights": engine.device["weights"]})
    roles = {"actor": actor, **roles, "rollout": engine}
    return roles | _reward_roles(config.reward, shapes, precision), published


def _adapter(config: Any) -> Adapter | None:
    lora = config.model.lora
    if lora is None:
        return None
    targets = tuple(lora.target_modules) if lora.target_modules else None
    return Adapter(lora.rank, targets, quantized=config.model.quantization is not None, experts=lora.experts)


def _travelling_adapter(config: PolicyRunConfig, shape: ModelShape) -> Adapter | None:
    """The adapters if pushes are of them alone; mixtures of experts get merged weights."""
    if config.rollout.weight_sync.lora == "merged" or why_adapters_are_merged(config) is not None:
        return None
    return None if shape.experts else _adapter(config)


def _model_settings(config: Any) -> dict[str, Any]:
    return {
        "sequence_parallel": config.model.sequence_parallel,
        "has_balance_loss": config.model.aux_loss_coef > 0,
        "freeze_vision": config.model.freeze_vision,
    }


def _image_tokens(config: Any, shape: ModelShape) -> int:
    """A bound on the image tokens of a micro-batch, as the data are not read: all tokens, and in policy runs
    the prompts' share of samples of full length. 0 for a model without vision.
    """
    tokens = config.train.max_tokens_per_micro_batch
    if shape.vision is None:
        return 0
    if not isinstance(config, PolicyRunConfig):
        return tokens
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    return tokens * prompt // (prompt + response)


def _alternating(one: Bytes, other: Bytes) -> Bytes:
    """Two models that a worker trains one after the other: both states, and the larger activations."""
    working = [one.only(*STATES) + other.only(*STATES)]
    temporary = max((one, other), key=lambda each: each.total - each.only(*STATES).total)
    extra = {kind: size for kind, size in temporary.device.items() if kind not in STATES}
    return working[0] + Bytes(extra)


def _served_ref(config: PolicyRunConfig, shape: ModelShape, precision: Precision, gpu: Gpu | None) -> Bytes:
    assert config.ref is not None
    if config.ref.engine == "vllm":
        return memory.engine(
            shape,
            size=precision.weights,
            tensor_parallel=config.ref.tensor_parallel,
            capacity_bytes=gpu.memory_bytes if gpu else None,
            utilization=config.rollout.gpu_memory_utilization,
            batch_tokens=GPU_BATCH_TOKENS,
            cpu_kv_bytes=None if precision.on_gpu else config.rollout.kv_cache_bytes,
        )
    tokens = config.train.max_tokens_per_micro_batch
    return memory.frozen(shape, precision, name="ref", tokens=tokens)


def _engine(
    config: Any, shape: ModelShape, precision: Precision, gpu: Gpu | None, adapter: Adapter | None = None
) -> Bytes:
    """`adapter`: that pushes send alone; vLLM has buffers for one, of the next rank that it knows."""
    if adapter is not None:
        ranks = (rank for rank in ENGINE_LORA_RANKS if rank >= adapter.rank)
        adapter = replace(adapter, rank=next(ranks))
    return memory.engine(
        shape,
        size=precision.weights,
        tensor_parallel=config.rollout.tensor_parallel,
        capacity_bytes=gpu.memory_bytes if gpu else None,
        utilization=config.rollout.gpu_memory_utilization,
        batch_tokens=config.rollout.batch_tokens,
        cpu_kv_bytes=None if precision.on_gpu else config.rollout.kv_cache_bytes,
        adapter=adapter,
    )


def _reward_roles(reward: Any, shapes: _Shapes, precision: Precision) -> dict[str, Bytes]:
    sources = enumerate(reward.sources if reward is not None else [])
    return {
        f"reward:{index}": memory.frozen(
            shapes.of(source.path),
            precision,
            name=f"reward:{index}",
            tokens=source.max_tokens_per_batch,
            has_head=False,
        )
        for index, source in sources
        if source.type == "model"
    }


def _supervised_roles(config: Any, shapes: _Shapes, precision: Precision) -> dict[str, Bytes]:
    train, shape = config.train, shapes.of(config.model.path)
    model = memory.trainer(
        shape,
        train,
        precision,
        num_workers=train.num_workers,
        name="model",
        adapter=_adapter(config),
        **_model_settings(config),
        has_head=config.job not in SCORERS,
        image_tokens=_image_tokens(config, shape),
    )
    ref = getattr(config, "ref", None)
    if ref is not None and not ref.precompute and not config.model.holds_reference(ref.path):
        ranks = train.num_workers if train.zero_stage == 3 else 1
        model += memory.frozen(shapes.of(ref.path or config.model.path), precision, name="ref", ranks=ranks)
    roles = {"actor": model}
    if config.job == "kd":
        teacher = memory.frozen(
            shapes.of(config.teacher.path),
            precision,
            name="teacher",
            tokens=train.max_tokens_per_micro_batch,
        )
        if config.teacher.location == "serve":
            roles["teacher"] = teacher
        else:
            roles["actor"] = model + teacher
    return roles


def _generation_roles(
    config: Any, shapes: _Shapes, precision: Precision, gpu: Gpu | None
) -> dict[str, Bytes]:
    roles: dict[str, Bytes] = {}
    if config.data.response_key is None:
        roles["rollout"] = _engine(config, shapes.of(config.model.path), precision, gpu)
    return roles | _reward_roles(config.reward, shapes, precision) or {"score": Bytes()}


def _phases(
    spec: PlacementSpec, roles: Mapping[str, Bytes], *, sleeps: bool, offloads_weights: bool
) -> dict[str, tuple[int, ...]]:
    if not sleeps:
        return {"always": _per_slot(spec, {role: each.total for role, each in roles.items()})}

    def held(role: str, each: Bytes, phase: str) -> int:
        if kind_of(role) == "rollout":
            asleep = min(each.total, memory.ENGINE_RUNTIME_BYTES if "buffers" in each.device else 0)
            return {"training": asleep, "weight sync": each.only("weights", "buffers").total}.get(
                phase, each.total
            )
        if kind_of(role) in ("actor", "critic") and phase != "training":
            return 0 if offloads_weights and phase == "rollout" else each.only("weights").total
        return each.total

    return {
        phase: _per_slot(spec, {role: held(role, each, phase) for role, each in roles.items()})
        for phase in PHASES
    }


def _with_sleeping_states(role: str, held: Bytes, kinds: Sequence[str]) -> Bytes:
    """These kinds of a trainer's states are in host memory while engines work; its gradients are freed."""
    if kind_of(role) not in ("actor", "critic"):
        return held
    size = held.only(*kinds).total
    return held + Bytes({}, {"sleeping states": size}) if size else held


def _host_bytes(spec: PlacementSpec, roles: Mapping[str, Bytes], published: int) -> tuple[int, ...]:
    """The first trainer publishes weights, on its node; the old ones stay until the new ones are there."""
    sizes = list(_per_slot(spec, {role: each.host_total for role, each in roles.items()}))
    if published:
        sizes[spec.of("actor").slots[0]] += PUBLICATIONS * published
    return tuple(sizes)


def _per_slot(spec: PlacementSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    slots = [0] * spec.num_slots
    for plan in spec.roles:
        for unit in plan.units:
            for slot in unit:
                slots[slot] += sizes[plan.role]
    return tuple(slots)
