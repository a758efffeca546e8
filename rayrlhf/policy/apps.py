"""The run's Serve apps: rollout engines, reward sources, the environment and a served reference."""

from __future__ import annotations

from typing import Any

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.chat import read_chat_template
from rayrlhf.environments.deployment import NAME, EnvironmentSetup, environment_deployment
from rayrlhf.placement.slots import Slots
from rayrlhf.policy.job import PolicyJob
from rayrlhf.reward.deployments import reward_apps
from rayrlhf.reward.reading import PromptFormat
from rayrlhf.rollout.engine import rollout_deployment
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.rollout.logprob_server import scorer_deployment
from rayrlhf.runtime.preflight import Prepared
from rayrlhf.runtime.reporting import ToBoard
from rayrlhf.train.frozen_server import reference_deployment
from rayrlhf.usercode import log_of


def run_apps(job: PolicyJob, slots: Slots, prepared: Prepared, *, threads: int) -> dict[str, Any]:
    """App name -> bound deployment, the rollout app first."""
    config = job.config
    apps: dict[str, Any] = {
        job.rollout_app: rollout_deployment(
            engine_settings(
                config.model,
                config.rollout,
                seed=config.run.seed,
                max_model_tokens=max_model_tokens(config),
                weight_store=job.weight_store,
                on_gpu=slots.have_gpus,
                threads=threads,
                sleeps=job.engines_sleep,
                router_replay=config.rollout.router_replay,
                keeps_cache=config.rollout.weight_sync.running == "keep",
                adapter=job.adapter,
            ),
            slots,
            num_engines=config.rollout.num_engines,
            max_requests=config.rollout.max_concurrent_requests,
            sessions=config.rollout.environment is not None,
        )
    }
    apps |= reward_apps(
        config.reward,
        job.reward_apps,
        prepared.reward_functions,
        prompt_format=PromptFormat(config.model.path, config.data, config.model.trust_remote_code),
        label_key=config.data.label_key,
        slots=slots,
        run_path=config.run.path,
        say=ToBoard(job.board),
    )
    if prepared.environment is not None:
        setup = EnvironmentSetup(
            code=prepared.environment,
            rollout=config.rollout,
            data=config.data,
            tokenizer_path=config.model.path,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=read_chat_template(config.data),
            rollout_app=job.rollout_app,
            log=log_of(config.run.path, NAME),
            say=ToBoard(job.board),
        )
        apps[job.environment_app] = environment_deployment(setup)
    if config.ref_is_served:
        apps[job.ref_app] = _reference(config, slots, threads=threads)
    return apps


def _reference(config: PolicyRunConfig, slots: Slots, *, threads: int) -> Any:
    assert config.ref is not None
    path = config.ref.path or config.model.path
    if config.ref.engine == "packed":
        return reference_deployment(
            config.model,
            path,
            chunk_tokens=config.train.logprob_chunk_tokens,
            num_replicas=config.ref.num_replicas,
            slots=slots,
        )
    settings = engine_settings(
        config.model.model_copy(update={"path": path}),
        config.rollout.model_copy(update={"tensor_parallel": config.ref.tensor_parallel, "engine_args": {}}),
        seed=config.run.seed,
        max_model_tokens=max_model_tokens(config) + 1,  # scoring generates one token
        weight_store=None,
        on_gpu=slots.have_gpus,
        threads=threads,
    )
    return scorer_deployment(settings, slots, role="ref", num_replicas=config.ref.num_replicas)


def max_model_tokens(config: PolicyRunConfig) -> int:
    """Maximum sequence length of an engine: the prompt limit plus the longer of the two response limits."""
    rollout = config.rollout
    new_tokens = max(rollout.max_response_tokens, config.eval_sampling.max_new_tokens)
    return config.data.max_prompt_tokens + new_tokens
