"""Cross-field checks: each fires when broken, and not when the same keys are consistent."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rayrlhf.config.supervised import KdRunConfig, SftRunConfig
from tests.config.conftest import Load, Problems

# name: (overrides that break one rule, the path of its problem, what to add so that the rule holds)
RULES = {
    "rloo needs a group": (
        ["algorithm.advantage=rloo", "rollout.group_size=1"],
        "rollout.group_size",
        ["rollout.group_size=2"],
    ),
    "grpo needs a group": (
        ["algorithm.advantage=grpo", "rollout.group_size=1"],
        "rollout.group_size",
        ["rollout.group_size=2"],
    ),
    "dr_grpo needs a group": (
        ["algorithm.advantage=dr_grpo", "rollout.group_size=1"],
        "rollout.group_size",
        ["rollout.group_size=2"],
    ),
    "reinforce_pp_baseline needs a group": (
        ["algorithm.advantage=reinforce_pp_baseline", "rollout.group_size=1"],
        "rollout.group_size",
        ["rollout.group_size=2"],
    ),
    "a critic only with gae": (
        ["algorithm.advantage=reinforce_pp", "critic.lr=1e-5"],
        "critic",
        ["algorithm.advantage=gae"],
    ),
    "a critic warm-up only with gae": (
        ["algorithm.advantage=reinforce_pp", "algorithm.critic_warmup_steps=1"],
        "algorithm.critic_warmup_steps",
        ["algorithm.advantage=gae"],
    ),
    "the actor leaves its warm-up": (
        ["algorithm.critic_warmup_steps=10"],
        "algorithm.critic_warmup_steps",
        ["train.num_steps=11"],
    ),
    "workers share prompts evenly": (
        ["train.num_workers=3", "rollout.prompts_per_step=64"],
        "rollout.prompts_per_step",
        ["rollout.prompts_per_step=63"],
    ),
    # 4 prompts x 2 samples, 2 workers x 5 mini-batches: 8 < 10
    "mini-batches are filled": (
        [
            "rollout.prompts_per_step=4",
            "rollout.group_size=2",
            "train.num_workers=2",
            "algorithm.mini_batches=5",
        ],
        "algorithm.mini_batches",
        ["algorithm.mini_batches=4"],
    ),
    # 100 + 28 = 128 > 127
    "the longest sample fits": (
        [
            "data.max_prompt_tokens=100",
            "rollout.sampling.max_new_tokens=28",
            "train.max_tokens_per_micro_batch=127",
        ],
        "train.max_tokens_per_micro_batch",
        ["train.max_tokens_per_micro_batch=128"],
    ),
    "training samples": (
        ["rollout.sampling.temperature=0"],
        "rollout.sampling.temperature",
        ["rollout.sampling.temperature=0.1"],
    ),
    "adaptive KL has a target": (
        ["algorithm.kl_controller=adaptive"],
        "algorithm.kl_target",
        ["algorithm.kl_target=0.1"],
    ),
    "a KL target is used": (
        ["algorithm.kl_target=0.1"],
        "algorithm.kl_target",
        ["algorithm.kl_controller=adaptive"],
    ),
    "adaptive KL can move": (
        ["algorithm.kl_controller=adaptive", "algorithm.kl_target=0.1", "algorithm.kl_coef=0"],
        "algorithm.kl_coef",
        ["algorithm.kl_coef=0.1"],
    ),
    "a reference is asked": (
        ["algorithm.kl_coef=0", "ref.location=worker"],
        "ref",
        ["algorithm.kl_coef=0.1"],
    ),
    "replicas of the reference are used": (
        ["ref.num_replicas=2", "placement.preset=colocate_actor_ref"],
        "ref.num_replicas",
        ["ref.location=serve"],
    ),
    "adapters that travel alone are there": (
        ["rollout.weight_sync.lora=adapter"],
        "rollout.weight_sync.lora",
        ["model.lora.rank=8"],
    ),
    "adapters that travel alone are of a rank that vLLM takes": (
        ["rollout.weight_sync.lora=adapter", "model.lora.rank=513"],
        "rollout.weight_sync.lora",
        ["model.lora.rank=512"],
    ),
    "adapters that are off were there": (
        ["ref.location=adapters_off"],
        "ref.location",
        ["model.lora.rank=8"],
    ),
    "a separate reference is not the actor without adapters": (
        ["model.lora.rank=8", "ref.location=adapters_off", "ref.path=other"],
        "ref.path",
        ["ref.location=auto"],
    ),
    "the actor as reference has no replicas": (
        ["model.lora.rank=8", "ref.num_replicas=2"],
        "ref.num_replicas",
        ["ref.location=serve"],
    ),
    "weights of 4 bits have adapters": (
        ["model.quantization=nf4"],
        "model.quantization",
        ["model.lora.rank=8"],
    ),
    "17: a dense copy of a model of 4 bits is another model": (
        ["model.lora.rank=8", "model.quantization=nf4", "ref.location=serve"],
        "ref.location",
        ["ref.location=auto"],
    ),
    "policies drop nothing": (
        ["model.lora.dropout=0.1"],
        "model.lora.dropout",
        ["model.lora.dropout=0"],
    ),
    "the reference's engine is used": (
        ["ref.engine=vllm", "ref.location=worker"],
        "ref.engine",
        ["ref.location=auto"],
    ),
    "only vLLM spreads a reference": (
        ["ref.tensor_parallel=2"],
        "ref.tensor_parallel",
        ["ref.engine=vllm"],
    ),
    "vLLM scores at temperature 1": (
        ["ref.engine=vllm", "rollout.sampling.temperature=0.7"],
        "ref.engine",
        ["rollout.sampling.temperature=1.0"],
    ),
    "workers of a separate critic": (
        ["critic.num_workers=2", "placement.preset=colocate_all"],
        "critic.num_workers",
        ["critic.location=trainer"],
    ),
    "engines that work do not sleep": (
        ["rollout.sleep=true", "placement.preset=colocate_all", "rollout.max_staleness=1"],
        "rollout.sleep",
        ["rollout.sleep=auto"],
    ),
    "engines sleep where another role needs their memory": (
        ["rollout.sleep=true"],
        "rollout.sleep",
        ["placement.preset=colocate_all"],
    ),
    "pools belong to the preset of that name": (
        ["placement.pools=[{name: a, roles: [actor]}]"],
        "placement.pools",
        ["placement.preset=pools"],
    ),
    "the preset of pools has some": (
        ["placement.preset=pools"],
        "placement.pools",
        ["placement.pools=[{name: a, roles: [actor]}]"],
    ),
    "a role has one pool": (
        ["placement.preset=pools", "placement.pools=[{name: a, roles: [ref]}, {name: b, roles: [ref]}]"],
        "placement.pools",
        ["placement.pools.1.roles=[critic]"],
    ),
    "dual clip has a ratio": (
        ["algorithm.policy_loss=reinforce", "algorithm.dual_clip=3"],
        "algorithm.dual_clip",
        ["algorithm.policy_loss=ppo"],
    ),
    "a clipped weight is no bound": (
        ["algorithm.policy_loss=cispo", "algorithm.dual_clip=3"],
        "algorithm.dual_clip",
        ["algorithm.policy_loss=gspo"],
    ),
    "reinforce is on-policy": (
        ["algorithm.policy_loss=reinforce", "algorithm.updates_per_batch=2"],
        "algorithm.updates_per_batch",
        ["algorithm.policy_loss=ppo"],
    ),
    "17 reinforce takes one step per batch": (
        ["algorithm.policy_loss=reinforce", "algorithm.mini_batches=8"],
        "algorithm.mini_batches",
        ["algorithm.policy_loss=ppo"],
    ),
    "14 gspo averages over sequences": (
        ["algorithm.policy_loss=gspo", "algorithm.aggregation=token_mean"],
        "algorithm.aggregation",
        ["algorithm.aggregation=sequence_mean"],
    ),
    "14 gspo divides by each sequence's length": (
        ["algorithm.policy_loss=gspo", "algorithm.aggregation=sequence_sum_norm"],
        "algorithm.aggregation",
        ["algorithm.policy_loss=ppo"],
    ),
    "8 training samples have top_p 1": (
        ["rollout.sampling.top_p=0.95"],
        "rollout.sampling.top_p",
        ["rollout.sampling.top_p=1", "eval.sampling.top_p=0.95"],
    ),
    "8 training samples are sampled from all tokens": (
        ["rollout.sampling.top_k=20"],
        "rollout.sampling.top_k",
        ["rollout.sampling.top_k=-1", "eval.sampling.top_k=20"],
    ),
    "8 training samples may stop at once": (
        ["rollout.sampling.min_new_tokens=4"],
        "rollout.sampling.min_new_tokens",
        ["rollout.sampling.min_new_tokens=0", "eval.sampling.min_new_tokens=4"],
    ),
    "8 episodes are training samples too": (
        ["rollout.environment={environment: 'games:Guess'}", "rollout.sampling.top_p=0.95"],
        "rollout.sampling.top_p",
        ["rollout.sampling.top_p=1.0"],
    ),
    # 10 steps, of which 4 leave the actor alone
    "16 the actor has time to warm up": (
        ["train.warmup_steps=7", "algorithm.critic_warmup_steps=4"],
        "train.warmup_steps",
        ["algorithm.critic_warmup_steps=3"],
    ),
    "15 the rollout's limit holds in evaluations": (
        ["rollout.sampling.max_new_tokens=100", "eval.sampling.min_new_tokens=101"],
        "eval.sampling.min_new_tokens",
        ["eval.sampling.max_new_tokens=101"],
    ),
    "k1 in the loss has no gradient": (
        ["algorithm.kl_in=loss"],
        "algorithm.kl_estimator",
        ["algorithm.kl_estimator=k2"],
    ),
    # 64 prompts per step: one step could take 20 % of it · 64/12 off the coefficient, all of it and more
    "an adaptive KL is slow enough": (
        ["algorithm.kl_controller=adaptive", "algorithm.kl_target=0.1", "algorithm.kl_horizon=12"],
        "algorithm.kl_horizon",
        ["algorithm.kl_horizon=13"],
    ),
    "truncation bounds from above": (
        ["algorithm.rollout_correction={mode: truncate, low: 0.5}"],
        "algorithm.rollout_correction.low",
        ["algorithm.rollout_correction.mode=mask"],
    ),
    "a range of scores is a range": (
        ["algorithm.dynamic_sampling={low: 1, high: 1}", "rollout.group_size=2"],
        "algorithm.dynamic_sampling.low",
        ["algorithm.dynamic_sampling.low=0"],
    ),
    "dynamic sampling compares": (
        ["algorithm.dynamic_sampling={}"],
        "algorithm.dynamic_sampling",
        ["rollout.group_size=2"],
    ),
    "6 dynamic sampling knows its source": (
        [
            "algorithm.dynamic_sampling={source: corect}",
            "rollout.group_size=2",
            "reward.sources=[{type: model, path: a, name: correct}, {type: model, path: b}]",
        ],
        "algorithm.dynamic_sampling.source",
        ["algorithm.dynamic_sampling.source=correct"],
    ),
    "PPO-ptx has texts": (
        ["algorithm.ptx_coef=0.1"],
        "algorithm.ptx_coef",
        ["data.ptx={sources: a.jsonl, texts_per_step: 2}"],
    ),
    "texts have a weight": (
        ["data.ptx={sources: a.jsonl, texts_per_step: 2}"],
        "data.ptx",
        ["algorithm.ptx_coef=0.1"],
    ),
    "workers share texts evenly": (
        ["algorithm.ptx_coef=0.1", "data.ptx={sources: a.jsonl, texts_per_step: 3}", "train.num_workers=2"],
        "data.ptx.texts_per_step",
        ["data.ptx.texts_per_step=4"],
    ),
    "texts fit a micro-batch": (
        [
            "algorithm.ptx_coef=0.1",
            "data.ptx={sources: a.jsonl, texts_per_step: 2, max_tokens: 9000}",
        ],
        "data.ptx.max_tokens",
        ["data.ptx.max_tokens=8192"],
    ),
    "only the pool oversamples": (
        ["rollout.oversampling=1.5"],
        "rollout.oversampling",
        ["rollout.max_staleness=1"],
    ),
    "episodes come from an environment": (
        ["reward.sources=[{type: environment}]"],
        "reward.sources.0.type",
        ["rollout.environment={environment: 'games:Guess'}"],
    ),
    "an overlong buffer is shorter than a response": (
        ["reward.overlong={buffer_tokens: 256}"],
        "reward.overlong.buffer_tokens",
        ["reward.overlong.buffer_tokens=255"],
    ),
    "math needs the answer": (
        ["reward.sources=[{type: math}]"],
        "data.label_key",
        ["data.label_key=answer"],
    ),
    "several greedy responses are one": (
        ["data.eval=held-out.jsonl", "eval.samples_per_prompt=4"],
        "eval.samples_per_prompt",
        ["eval.sampling.temperature=0.7"],
    ),
    "probabilities of train for all or none": (
        ["data.train=[a, {path: b, probability: 0.5}]"],
        "data.train",
        ["data.train=[{path: a, probability: 1}, {path: b, probability: 0.5}]"],
    ),
    "probabilities of eval for all or none": (
        ["data.eval=[a, {path: b, probability: 0.5}]"],
        "data.eval",
        ["data.eval=[a, b]"],
    ),
    "one kind of template": (
        ["data.input_template='Q: {}'"],
        "data.input_template",
        ["data.apply_chat_template=false"],
    ),
    "a system prompt needs the chat template": (
        ["data.apply_chat_template=false", "data.system_prompt=Be brief."],
        "data.system_prompt",
        ["data.apply_chat_template=true"],
    ),
    "fewest tokens fit": (
        ["rollout.sampling.min_new_tokens=257"],
        "rollout.sampling.min_new_tokens",
        ["rollout.sampling.min_new_tokens=0"],
    ),
    "fewest tokens of an evaluation fit": (
        ["eval.sampling.min_new_tokens=257", "eval.sampling.max_new_tokens=256"],
        "eval.sampling.min_new_tokens",
        ["eval.sampling.max_new_tokens=257"],
    ),
    "evaluation at steps has prompts": (
        ["eval.every_steps=5"],
        "eval.every_steps",
        ["data.eval=held-out.jsonl"],
    ),
    "evaluation of prompts has prompts": (
        ["eval.num_prompts=5"],
        "eval.num_prompts",
        ["data.eval=held-out.jsonl"],
    ),
    "the learning rate's warm-up ends": (
        ["train.warmup_steps=11"],
        "train.warmup_steps",
        ["train.num_steps=11"],
    ),
    "offloading has a partition": (
        ["train.offload_optimizer=true", "train.zero_stage=0"],
        "train.offload_optimizer",
        ["train.zero_stage=1"],
    ),
    "weights are offloaded in parts": (
        ["train.offload_params=true"],
        "train.offload_params",
        ["train.zero_stage=3"],
    ),
    "a second copy of the weights only with partitioned ones": (
        ["train.hpz_partition_size=2", "train.num_workers=2"],
        "train.hpz_partition_size",
        ["train.zero_stage=3"],
    ),
    "a second copy of the weights is shared evenly": (
        ["train.hpz_partition_size=3", "train.num_workers=4", "train.zero_stage=3"],
        "train.hpz_partition_size",
        ["train.hpz_partition_size=2"],
    ),
    "a second copy of the weights undoes offloading": (
        [
            "train.hpz_partition_size=2",
            "train.num_workers=2",
            "train.zero_stage=3",
            "train.offload_params=true",
        ],
        "train.hpz_partition_size",
        ["train.offload_params=false"],
    ),
    "sequences are shared by groups of workers": (
        ["model.sequence_parallel=3", "train.num_workers=4"],
        "model.sequence_parallel",
        ["model.sequence_parallel=2"],
    ),
    "a critic's workers share sequences too": (
        [
            "model.sequence_parallel=2",
            "train.num_workers=4",
            "critic.location=trainer",
            "critic.num_workers=3",
        ],
        "model.sequence_parallel",
        ["critic.num_workers=2"],
    ),
    "offloaded activations are checkpointed": (
        ["train.activation_offload=true"],
        "train.activation_offload",
        ["train.gradient_checkpointing=true"],
    ),
    "weights in parts do not leave for engines": (
        [
            "train.offload_weights_between=true",
            "placement.preset=colocate_all",
            "rollout.sleep=true",
            "train.zero_stage=3",
        ],
        "train.offload_weights_between",
        ["train.zero_stage=2"],
    ),
    "weights leave only for engines that sleep": (
        ["train.offload_weights_between=true", "placement.preset=disaggregated"],
        "train.offload_weights_between",
        ["placement.preset=colocate_all"],
    ),
    "operations are fused once": (
        ["model.compile=true", "model.kernels=liger"],
        "model.kernels",
        ["model.compile=false"],
    ),
    "compiled layers have whole weights": (
        ["model.compile=true", "train.zero_stage=3"],
        "model.compile",
        ["train.zero_stage=2"],
    ),
    "shared sequences meet in SDPA": (
        ["model.sequence_parallel=2", "train.num_workers=2", "model.attention=flash_attention_2"],
        "model.attention",
        ["model.attention=auto"],
    ),
    "gradients add up in partitions": (
        ["train.grad_accum_dtype=float32", "train.zero_stage=1"],
        "train.grad_accum_dtype",
        ["train.zero_stage=2"],
    ),
    "gradients on the host add up in fp32 under ZeRO-3": (
        ["train.grad_accum_dtype=float32", "train.zero_stage=2", "train.offload_optimizer=true"],
        "train.grad_accum_dtype",
        ["train.zero_stage=3"],
    ),
    "short masters have short gradients": (
        ["train.grad_accum_dtype=float32", "train.zero_stage=3", "train.master_weights=bfloat16"],
        "train.grad_accum_dtype",
        ["train.master_weights=float32"],
    ),
    "overlapping has a reduction": (
        ["train.overlap_comm=true", "train.zero_stage=1"],
        "train.overlap_comm",
        ["train.zero_stage=2"],
    ),
    "a clip is a range": (["reward.clip=[1, -1]"], "reward.clip", ["reward.clip=[-1, 1]"]),
    "names of rewards differ": (
        ["reward.sources=[{type: model, path: a, name: x}, {type: model, path: b, name: x}]"],
        "reward.sources",
        ["reward.sources.1.name=y"],
    ),
}


@pytest.mark.parametrize(("broken", "path", "fixed"), RULES.values(), ids=RULES)
def test_a_rule_fires_when_broken_and_only_then(
    broken: list[str], path: str, fixed: list[str], load: Load, problems: Problems
) -> None:
    found = problems(*broken)
    assert list(found) == [path]
    assert found[path].got and found[path].wanted and found[path].fix
    load(*broken, *fixed)


@pytest.mark.parametrize(("broken", "path", "fixed"), RULES.values(), ids=RULES)
def test_an_unrelated_error_hides_no_rule(
    broken: list[str], path: str, fixed: list[str], problems: Problems
) -> None:
    # One bad value in the section that nearly every rule reads, one at the top, one unknown key.
    found = problems(*broken, "train.lr=fast", "run.seed=-1", "checkpoint.evry_steps=3")
    assert found.keys() == {path, "train.lr", "run.seed", "checkpoint.evry_steps"}


def test_rules_broken_together_are_reported_together(problems: Problems) -> None:
    found = problems(
        "algorithm.advantage=grpo",
        "rollout.group_size=1",
        "critic.lr=1e-5",
        "train.num_workers=7",
        "train.warmup_steps=11",
        "algorithm.lam=2",
    )
    assert found.keys() == {
        "rollout.group_size",
        "critic",
        "rollout.prompts_per_step",
        "train.warmup_steps",
        "algorithm.lam",
    }


def test_a_rule_does_not_fire_on_a_value_that_is_invalid_already(problems: Problems) -> None:
    # With the default group_size, 1, the rule of grpo would fire; what the user meant is not known.
    assert problems("algorithm.advantage=grpo", "rollout.group_size=many").keys() == {"rollout.group_size"}
    assert problems("algorithm.advantage=grpo", "rollout.gruop_size=4").keys() == {"rollout.gruop_size"}


def test_the_message_has_the_arithmetic(problems: Problems) -> None:
    prompts = problems("train.num_workers=7")["rollout.prompts_per_step"]
    assert "63 or 70" in prompts.fix  # the multiples of 7 around 64
    longest = problems("train.max_tokens_per_micro_batch=1000")["train.max_tokens_per_micro_batch"]
    assert "1280" in longest.wanted and "1280" in longest.fix  # 1024 + 256, the defaults


def test_what_is_needed_and_left_out_gets_its_defaults(load: Load) -> None:
    ppo = load()
    assert ppo.needs_critic and ppo.critic is not None and ppo.critic.lr == 1e-5
    assert ppo.needs_ref and ppo.ref is not None and ppo.ref.location == "auto"
    bare = load("algorithm.advantage=reinforce_pp", "algorithm.kl_coef=0")
    assert not bare.needs_critic and bare.critic is None
    assert not bare.needs_ref and bare.ref is None


def test_distillation_shares_no_sequences() -> None:
    tree = {"run": {"name": "kd"}, "model": {"path": "student", "sequence_parallel": 2}}
    tree |= {"data": {"train": "rows.jsonl"}, "teacher": {"path": "teacher"}, "train": {"num_workers": 2}}
    with pytest.raises(ValidationError, match="a teacher scores whole sequences"):
        KdRunConfig.model_validate(tree)
    KdRunConfig.model_validate(tree | {"model": {"path": "student"}})


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (
            {"tokens_per_step": 4096, "samples_per_step": 64, "max_tokens_per_micro_batch": 1024},
            "one of the two: both set the size of a step",
        ),
        (
            {"tokens_per_step": 6000, "num_workers": 2, "max_tokens_per_micro_batch": 1024},
            "a multiple of 1024 x 2 = 2048.*set train.tokens_per_step to 6144",
        ),
        ({"tokens_per_step": 4096}, "which rows make a step depends on it"),
        ({"fill_micro_batches": True}, "which rows make a step depends on it"),
    ],
)
def test_steps_of_supervised_jobs_have_one_size_that_the_workers_share(
    train: dict[str, Any], wanted: str
) -> None:
    tree = {"run": {"name": "sft"}, "model": {"path": "model"}, "data": {"train": "rows.jsonl"}}
    data = {**tree["data"], "max_tokens": 512}
    with pytest.raises(ValidationError, match=f"(?s){wanted}"):
        SftRunConfig.model_validate(tree | {"data": data, "train": train})


def test_the_size_of_a_step_is_filled_in() -> None:
    tree = {
        "run": {"name": "sft"},
        "model": {"path": "model"},
        "data": {"train": "r.jsonl", "max_tokens": 64},
    }
    assert SftRunConfig.model_validate(tree).train.samples_per_step == 64
    train = {"tokens_per_step": 4096, "max_tokens_per_micro_batch": 1024}
    config = SftRunConfig.model_validate(tree | {"train": train})
    assert config.train.samples_per_step is None
    resolved = config.model_dump(mode="json")  # as in the run's folder, where all keys are given
    assert SftRunConfig.model_validate(resolved).train == config.train
