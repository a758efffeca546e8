"""Config of a policy run, and its cross-section checks."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from rayrlhf.config.adapter_push import adapters_can_travel_alone
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.base import Problem, Section
from rayrlhf.config.common import ObserveConfig, TrainedRunSection
from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.learning_rates import with_lora_lr
from rayrlhf.config.model import (
    CriticConfig,
    RefConfig,
    TrainedModelConfig,
    compiled_weights_are_whole,
    reference_is_quantized,
    sequences_are_shared,
)
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.policy_checks import (
    actor_has_its_warmup,
    any_token_may_stop,
    dynamic_sampling_knows_its_source,
    no_token_is_cut,
    nucleus_is_whole,
    shortest_evaluation_fits,
)
from rayrlhf.config.reward import RewardConfig, check_reward_needs
from rayrlhf.config.rollout import RolloutConfig, SamplingConfig
from rayrlhf.config.train import CheckpointConfig, EvalConfig, TrainConfig

GROUP_SIZE = 8  # of estimators that compare a prompt's samples


def _groups_have_a_baseline(config: PolicyRunConfig) -> Problem | None:
    if not config.algorithm.estimator.needs_group or config.rollout.group_size >= 2:
        return None
    if "group_size" not in config.rollout.model_fields_set:
        return None  # it gets its default when all else is valid
    return Problem(
        "rollout.group_size",
        got=f"{config.rollout.group_size} with algorithm.advantage={config.algorithm.advantage}",
        wanted="an integer >= 2 (a group of one has no baseline)",
        fix="set rollout.group_size to 2 or more, or algorithm.advantage to gae or reinforce_pp",
    )


def _critic_is_used(config: PolicyRunConfig) -> Problem | None:
    if config.critic is None or config.needs_critic:
        return None
    return Problem(
        "critic",
        got=f"a section critic with algorithm.advantage={config.algorithm.advantage}",
        wanted="no critic: only algorithm.advantage=gae has one",
        fix="remove the section critic (on the command line: critic=null), or set algorithm.advantage to gae",
    )


def _ref_is_used(config: PolicyRunConfig) -> Problem | None:
    if config.ref is None or config.needs_ref:
        return None
    return Problem(
        "ref",
        got="a section ref with algorithm.kl_coef=0",
        wanted="no ref: without a KL term nothing uses the reference",
        fix="remove the section ref (on the command line: ref=null), or set algorithm.kl_coef above 0",
    )


def _workers_share_prompts_evenly(config: PolicyRunConfig) -> Problem | None:
    prompts, workers = config.rollout.prompts_per_step, config.train.num_workers
    if prompts % workers == 0:
        return None
    below, above = prompts // workers * workers, (prompts // workers + 1) * workers
    return Problem(
        "rollout.prompts_per_step",
        got=f"{prompts} with train.num_workers={workers}",
        wanted=f"a multiple of train.num_workers, {workers}: every worker takes the same number of prompts",
        fix=f"set rollout.prompts_per_step to {f'{below} or {above}' if below else above}",
    )


def _mini_batches_are_filled(config: PolicyRunConfig) -> Problem | None:
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    parts = config.algorithm.mini_batches * config.train.num_workers
    if samples >= parts:
        return None
    return Problem(
        "algorithm.mini_batches",
        got=f"{config.algorithm.mini_batches} x {config.train.num_workers} workers for {samples} samples "
        f"({config.rollout.prompts_per_step} prompts x {config.rollout.group_size})",
        wanted="at least one sample per mini-batch and worker",
        fix=f"lower algorithm.mini_batches, or raise rollout.prompts_per_step until there are {parts}",
    )


def _longest_sample_fits(config: PolicyRunConfig) -> Problem | None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if config.train.max_tokens_per_micro_batch >= prompt + response:
        return None
    key = "environment.max_response_tokens" if config.rollout.environment else "sampling.max_new_tokens"
    return Problem(
        "train.max_tokens_per_micro_batch",
        got=str(config.train.max_tokens_per_micro_batch),
        wanted=f"an integer >= {prompt + response}, the longest sample: data.max_prompt_tokens={prompt} "
        f"+ rollout.{key}={response}",
        fix=f"set train.max_tokens_per_micro_batch to {prompt + response} or more, or lower the others",
    )


def _training_samples(config: PolicyRunConfig) -> Problem | None:
    if config.rollout.sampling.temperature > 0:
        return None
    return Problem(
        "rollout.sampling.temperature",
        got="0 (greedy)",
        wanted="a number > 0: a policy gradient needs samples",
        fix="set rollout.sampling.temperature to 1.0; eval.sampling may stay greedy",
    )


def _actor_leaves_warmup(config: PolicyRunConfig) -> Problem | None:
    if config.algorithm.critic_warmup_steps < config.train.num_steps:
        return None
    return Problem(
        "algorithm.critic_warmup_steps",
        got=f"{config.algorithm.critic_warmup_steps} with train.num_steps={config.train.num_steps}",
        wanted="fewer than train.num_steps: the actor would never be trained",
        fix="lower algorithm.critic_warmup_steps or raise train.num_steps",
    )


def _dynamic_sampling_has_groups(config: PolicyRunConfig) -> Problem | None:
    if config.algorithm.dynamic_sampling is None or config.rollout.group_size >= 2:
        return None
    return Problem(
        "algorithm.dynamic_sampling",
        got=f"a section dynamic_sampling with rollout.group_size={config.rollout.group_size}",
        wanted="groups of 2 or more: it compares the samples of a prompt",
        fix="set rollout.group_size to 2 or more, or remove algorithm.dynamic_sampling",
    )


def _adaptive_kl_is_slow(config: PolicyRunConfig) -> Problem | None:
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    if config.algorithm.kl_controller != "adaptive" or 5 * config.algorithm.kl_horizon > samples:
        return None
    return Problem(
        "algorithm.kl_horizon",
        got=f"{config.algorithm.kl_horizon} for {samples} samples per step",
        wanted=f"more than {samples // 5}: a single step could otherwise bring the coefficient to 0",
        fix="raise algorithm.kl_horizon",
    )


def _ptx_has_both_halves(config: PolicyRunConfig) -> Problem | None:
    if (config.algorithm.ptx_coef > 0) == (config.data.ptx is not None):
        return None
    if config.data.ptx is None:
        return Problem(
            "algorithm.ptx_coef",
            got=f"{config.algorithm.ptx_coef:g} without data.ptx",
            wanted="texts to train on in data.ptx",
            fix="give data.ptx, or remove algorithm.ptx_coef",
        )
    return Problem(
        "data.ptx",
        got="texts with algorithm.ptx_coef=0",
        wanted="a coefficient above 0: the texts would be left unused",
        fix="set algorithm.ptx_coef (for example to 0.05), or remove data.ptx",
    )


def _ptx_fits(config: PolicyRunConfig) -> Problem | None:
    ptx = config.data.ptx
    if ptx is None:
        return None
    if ptx.texts_per_step % config.train.num_workers:
        return Problem(
            "data.ptx.texts_per_step",
            got=f"{ptx.texts_per_step} with train.num_workers={config.train.num_workers}",
            wanted="a multiple of train.num_workers: every worker takes the same number of texts",
            fix=f"set data.ptx.texts_per_step to a multiple of {config.train.num_workers}",
        )
    if ptx.max_tokens <= config.train.max_tokens_per_micro_batch:
        return None
    return Problem(
        "data.ptx.max_tokens",
        got=f"{ptx.max_tokens} > train.max_tokens_per_micro_batch={config.train.max_tokens_per_micro_batch}",
        wanted="at most one micro-batch",
        fix="lower data.ptx.max_tokens or raise train.max_tokens_per_micro_batch",
    )


def _episodes_come_from_an_environment(config: PolicyRunConfig) -> Problem | None:
    indices = [i for i, source in enumerate(config.reward.sources) if source.type == "environment"]
    if not indices or config.rollout.environment is not None:
        return None
    return Problem(
        f"reward.sources.{indices[0]}.type",
        got="environment without rollout.environment",
        wanted="an environment that gives the rewards",
        fix="give rollout.environment, or take another reward source",
    )


def _overlong_buffer_fits(config: PolicyRunConfig) -> Problem | None:
    overlong, longest = config.reward.overlong, config.rollout.max_response_tokens
    if overlong is None or overlong.buffer_tokens < longest:
        return None
    return Problem(
        "reward.overlong.buffer_tokens",
        got=f"{overlong.buffer_tokens} with responses of at most {longest} tokens",
        wanted="fewer: the penalty begins that many tokens before the limit",
        fix="lower reward.overlong.buffer_tokens",
    )


def _evaluation_has_prompts(config: PolicyRunConfig) -> Problem | None:
    given = [key for key in ("every_steps", "num_prompts") if getattr(config.eval, key) is not None]
    if config.data.eval or not given:
        return None
    return Problem(
        f"eval.{given[0]}",
        got=f"{getattr(config.eval, given[0])} without data.eval",
        wanted="held-out prompts in data.eval",
        fix=f"give data.eval, or remove eval.{' and eval.'.join(given)}",
    )


def _critic_workers_are_used(config: PolicyRunConfig) -> Problem | None:
    if config.critic is None or config.critic.num_workers is None or config.critic_is_separate:
        return None
    return Problem(
        "critic.num_workers",
        got=f"{config.critic.num_workers} with {_why_in_worker(config, 'critic')}",
        wanted="nothing: this critic runs in the actor's workers",
        fix="set critic.location to trainer, or remove critic.num_workers",
    )


def _ref_is_the_actor_without_adapters(config: PolicyRunConfig) -> Problem | None:
    if config.ref is None or config.ref.location != "adapters_off":
        return None
    if config.model.lora is None:
        return Problem(
            "ref.location",
            got="adapters_off without model.lora",
            wanted="auto, worker or serve: an actor that is trained as a whole has no adapters to switch off",
            fix="set ref.location to auto, or give model.lora",
        )
    if config.ref.path is None:
        return None
    return Problem(
        "ref.path",
        got=f"{config.ref.path} with ref.location=adapters_off",
        wanted="nothing: this reference is the actor itself, as it was at its start",
        fix="remove ref.path, or set ref.location to auto",
    )


def _ref_has_the_weights_of_the_start(config: PolicyRunConfig) -> Problem | None:
    ref = config.ref
    if ref is None or config.model.quantization is None or config.ref_is_the_actor:
        return None
    if ref.path is None:
        return reference_is_quantized(config.model, "ref.location", ref.location)
    if ref.path != config.model.path:
        return None
    return reference_is_quantized(config.model, "ref.path", f"{ref.path}, which is model.path,")


def _workers_share_sequences(config: PolicyRunConfig) -> Problem | None:
    if config.needs_critic and config.critic is not None and config.critic.num_workers is not None:
        problem = sequences_are_shared(config.model, config.num_critic_workers, "critic.num_workers")
        if problem is not None:
            return problem
    return sequences_are_shared(config.model, config.train.num_workers, "train.num_workers")


def _policies_have_no_dropout(config: PolicyRunConfig) -> Problem | None:
    lora = config.model.lora
    if lora is None or lora.dropout == 0:
        return None
    return Problem(
        "model.lora.dropout",
        got=f"{lora.dropout:g}",
        wanted="0: with dropout the trained policy would differ from the one that the engines sample from",
        fix="remove model.lora.dropout",
    )


def _ref_replicas_are_used(config: PolicyRunConfig) -> Problem | None:
    ref = config.ref
    if ref is None or config.ref_is_served or (ref.num_replicas == 1 and ref.engine == "packed"):
        return None
    key = "num_replicas" if ref.num_replicas > 1 else "engine"
    return Problem(
        f"ref.{key}",
        got=f"{getattr(ref, key)} with {_why_in_worker(config, 'ref')}",
        wanted="nothing: this reference runs in the actor's workers",
        fix=f"set ref.location to serve, or remove ref.{key}",
    )


def _why_in_worker(config: PolicyRunConfig, section: Literal["critic", "ref"]) -> str:
    part = getattr(config, section)
    if section == "ref" and config.ref_is_the_actor:
        return "model.lora, where the reference is the actor with its adapters off"
    if part.location == "worker":
        return f"{section}.location=worker"
    return f"placement.preset={config.placement.preset}, where actor and {section} share slots"


def _vllm_scores_at_temperature_one(config: PolicyRunConfig) -> Problem | None:
    temperature = config.rollout.sampling.temperature
    if config.ref is None or config.ref.engine == "packed" or temperature == 1:
        return None
    return Problem(
        "ref.engine",
        got=f"vllm with rollout.sampling.temperature={temperature:g}",
        wanted="temperature 1: vLLM returns log-probabilities of a prompt at no other",
        fix="set rollout.sampling.temperature to 1, or ref.engine to packed",
    )


def _weights_leave_for_engines(config: PolicyRunConfig) -> Problem | None:
    key = "train.offload_weights_between"
    if not config.train.offload_weights_between:
        return None
    if config.model.quantization is not None:
        return Problem(
            key,
            got=f"true with model.quantization={config.model.quantization}",
            wanted="false: weights in 4 bits are read together with constants that stay on the GPU",
            fix=f"remove {key}",
        )
    if config.engines_sleep(on_gpu=True):
        return None
    return Problem(
        key,
        got="true with engines that do not sleep",
        wanted="false: only engines that take turns with trainers use the memory that it frees",
        fix=f"remove {key}, or set placement.preset to colocate_all and rollout.sleep to auto",
    )


def _compiled_weights_are_whole(config: PolicyRunConfig) -> Problem | None:
    return compiled_weights_are_whole(config.model, config.train.zero_stage)


def _sleeping_engines_share(config: PolicyRunConfig) -> Problem | None:
    if config.rollout.sleep is not True or config.engines_share_with_trainers:
        return None
    return Problem(
        "rollout.sleep",
        got=f"true with placement.preset={config.placement.preset}",
        wanted="false: no other role would use the memory of these engines",
        fix="remove rollout.sleep, or set placement.preset to colocate_all",
    )


class PolicyRunConfig(Section):
    run: TrainedRunSection
    """Name, folder and seed."""
    model: TrainedModelConfig
    """The actor."""
    data: PromptDataConfig
    """Prompts."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Estimator, objective, KL."""
    # After `algorithm`, which decides whether they are needed: pydantic validates fields in this order.
    critic: CriticConfig | None = None
    """The critic, for advantage: gae; null with any other."""
    ref: RefConfig | None = None
    """The reference policy of the KL penalty; null when kl_coef is 0."""
    rollout: RolloutConfig = RolloutConfig()
    """Engines and sampling."""
    reward: RewardConfig
    """What scores a sample."""
    placement: PlacementConfig = PlacementConfig()
    """Which roles share slots."""
    train: TrainConfig
    """Optimizer and training steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out prompts."""
    observe: ObserveConfig = ObserveConfig()
    """Console, TensorBoard, Weights & Biases, logged rollouts."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""

    checks = (
        _groups_have_a_baseline,
        _critic_is_used,
        _ref_is_used,
        _workers_share_prompts_evenly,
        _mini_batches_are_filled,
        _longest_sample_fits,
        _training_samples,
        nucleus_is_whole,
        no_token_is_cut,
        any_token_may_stop,
        _actor_leaves_warmup,
        actor_has_its_warmup,
        shortest_evaluation_fits,
        _evaluation_has_prompts,
        _dynamic_sampling_has_groups,
        dynamic_sampling_knows_its_source,
        _adaptive_kl_is_slow,
        _ptx_has_both_halves,
        _ptx_fits,
        _episodes_come_from_an_environment,
        _overlong_buffer_fits,
        check_reward_needs,
        _critic_workers_are_used,
        _ref_is_the_actor_without_adapters,
        _ref_has_the_weights_of_the_start,
        _ref_replicas_are_used,
        _workers_share_sequences,
        _compiled_weights_are_whole,
        _policies_have_no_dropout,
        _vllm_scores_at_temperature_one,
        _sleeping_engines_share,
        _weights_leave_for_engines,
        adapters_can_travel_alone,
    )

    @field_validator("rollout")
    @classmethod
    def _default_group_size(cls, rollout: RolloutConfig, info: ValidationInfo) -> RolloutConfig:
        algorithm = info.data.get("algorithm")
        compares = algorithm is not None and algorithm.estimator.needs_group
        if not compares or "group_size" in rollout.model_fields_set:
            return rollout
        return rollout.model_copy(update={"group_size": GROUP_SIZE})

    @field_validator("train")
    @classmethod
    def _lr_of_adapters(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        return with_lora_lr(train, info.data.get("model"))

    @field_validator("critic")
    @classmethod
    def _default_critic(cls, critic: CriticConfig | None, info: ValidationInfo) -> CriticConfig | None:
        """Fill in defaults if a critic is needed, so that the resolved config shows them."""
        algorithm = info.data.get("algorithm")
        needed = algorithm is not None and algorithm.estimator.needs_critic
        return CriticConfig() if critic is None and needed else critic

    @field_validator("ref")
    @classmethod
    def _default_ref(cls, ref: RefConfig | None, info: ValidationInfo) -> RefConfig | None:
        algorithm = info.data.get("algorithm")
        needed = algorithm is not None and algorithm.kl_coef > 0
        return RefConfig() if ref is None and needed else ref

    @property
    def eval_sampling(self) -> SamplingConfig:
        """Sampling of evaluation responses: eval.sampling, with its null fields from rollout.sampling."""
        return self.eval.sampling.completed(self.rollout.sampling)

    @property
    def needs_critic(self) -> bool:
        return self.algorithm.estimator.needs_critic

    @property
    def needs_ref(self) -> bool:
        return self.algorithm.kl_coef > 0

    @property
    def critic_is_separate(self) -> bool:
        """Whether the critic has a separate trainer."""
        if not self.needs_critic or self.critic is None:
            return False
        if self.critic.location == "auto":
            return not self.placement.together("actor", "critic")
        return self.critic.location == "trainer"

    @property
    def num_critic_workers(self) -> int:
        assert self.critic is not None
        return self.critic.num_workers or self.train.num_workers

    @property
    def ref_is_the_actor(self) -> bool:
        """Whether the reference is the actor itself with its adapters off."""
        if not self.needs_ref or self.ref is None or self.ref.location not in ("auto", "adapters_off"):
            return False
        return self.model.holds_reference(self.ref.path)

    @property
    def ref_is_served(self) -> bool:
        """Whether the reference is served by Ray Serve."""
        if not self.needs_ref or self.ref is None or self.ref_is_the_actor:
            return False
        if self.ref.location == "auto":
            return not self.placement.together("actor", "ref")
        return self.ref.location == "serve"

    def engines_sleep(self, *, on_gpu: bool) -> bool:
        """Whether engines and trainers time-share the memory of their slots (hybrid engine).

        On CPUs the memory plan counts both: to give memory back and touch it again would only take time.
        """
        if self.rollout.sleep != "auto":
            return self.rollout.sleep
        return on_gpu and self.rollout.max_staleness is None and self.engines_share_with_trainers

    @property
    def engines_share_with_trainers(self) -> bool:
        with_critic = self.critic_is_separate and self.placement.together("critic", "rollout")
        return with_critic or self.placement.together("actor", "rollout")
