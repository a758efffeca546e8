"""`launch`: the machines that a job is launched on. Only `rayrlhf render` reads it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, NaturalNumber, Problem, Section, Wanted
from rayrlhf.secrets import is_secret_name

Quantity = Annotated[str, Field(pattern=r"^[1-9]\d*(Mi|Gi|Ti)$"), Wanted("an amount of memory such as 512Gi")]
ResourceName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"),
    Wanted("lower-case letters, digits and '-', as Kubernetes names things"),
]
AbsolutePath = Annotated[str, Field(pattern=r"^/\S*$"), Wanted("an absolute path")]


SecretName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[-._a-zA-Z0-9]+)?$"),
    Wanted("the name of a secret, or name/key, never its value"),
]
VariableName = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), Wanted("a name of an environment variable")
]
# Key prefixes of known services, and a password in a URL: secrets whatever the variable's name.
_SECRET_VALUE = re.compile(
    r"^(hf_|sk-|ghp_|github_pat_|glpat-|AKIA|xox[bp]-)\w|-----BEGIN|^\w+://[^/\s:@]*:[^/\s@]+@"
)


def _no_secret_is_written_down(launch: LaunchConfig) -> Problem | None:
    for name, value in launch.env.items():
        if value and (is_secret_name(name) or _SECRET_VALUE.search(value)):
            return Problem(
                f"env.{name}",
                got="a literal value, which would be written to every rendered file",
                wanted="the name of a secret that the launcher knows",
                fix=f"remove it, and set launch.env_from_secret.{name} to a secret (name or name/key)",
            )
    return None


def _a_variable_has_one_source(launch: LaunchConfig) -> Problem | None:
    twice = sorted(launch.env.keys() & launch.env_from_secret.keys())
    if not twice:
        return None
    return Problem(
        f"env_from_secret.{twice[0]}",
        got=f"launch.env.{twice[0]}, too",
        wanted="one source for a variable",
        fix=f"remove launch.env.{twice[0]}",
    )


def _ttl_has_a_shutdown(kuberay: KubeRayConfig) -> Problem | None:
    if kuberay.ttl_seconds_after_finished == 0 or kuberay.shutdown_after_job_finishes:
        return None
    return Problem(
        "ttl_seconds_after_finished",
        got=f"{kuberay.ttl_seconds_after_finished} with shutdown_after_job_finishes=false",
        wanted="0: the operator refuses a time to live without a shutdown",
        fix="set launch.kuberay.shutdown_after_job_finishes to true, or remove ttl_seconds_after_finished",
    )


def _retries_have_a_submitter(kuberay: KubeRayConfig) -> Problem | None:
    if kuberay.backoff_limit == 0 or kuberay.submission_mode != "InteractiveMode":
        return None
    return Problem(
        "backoff_limit",
        got=f"{kuberay.backoff_limit} with submission_mode=InteractiveMode",
        wanted="0: in this mode you submit the job yourself, and the operator cannot repeat it",
        fix="remove launch.kuberay.backoff_limit, or set submission_mode to HTTPMode",
    )


def _gangs_are_submitted_by_http(kuberay: KubeRayConfig) -> Problem | None:
    if kuberay.queue is None or kuberay.submission_mode == "HTTPMode":
        return None
    return Problem(
        "submission_mode",
        got=f"{kuberay.submission_mode} with queue={kuberay.queue}",
        wanted="HTTPMode: the gang scheduler would not count the submitter's pod",
        fix="set launch.kuberay.submission_mode to HTTPMode, or remove launch.kuberay.queue",
    )


def _a_token_has_authentication(kuberay: KubeRayConfig) -> Problem | None:
    if kuberay.auth_secret is None or kuberay.auth == "token":
        return None
    return Problem(
        "auth_secret",
        got=f"{kuberay.auth_secret} with auth=disabled",
        wanted="auth=token: otherwise no token is required",
        fix="remove launch.kuberay.auth_secret, or set launch.kuberay.auth to token",
    )


class KubeRayConfig(Section):
    namespace: ResourceName = "default"
    """Kubernetes namespace."""
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "HTTPMode"
    """Who submits the job: a separate pod, the operator, a sidecar container of the head, or you."""
    backoff_limit: NaturalNumber = 2
    """How often a failed job is retried on a new cluster; it resumes from its newest checkpoint."""
    active_deadline_seconds: Count | None = None
    """Deadline of the job, retries included."""
    shutdown_after_job_finishes: bool = True
    """Delete the cluster when the job has ended."""
    ttl_seconds_after_finished: NaturalNumber = 600
    """How long the cluster is kept after the job has ended, for its logs."""
    project_dir: AbsolutePath = "/rayrlhf"
    """Where the image holds this repository."""
    volume_claim: ResourceName = "rayrlhf"
    """PersistentVolumeClaim that every pod mounts (ReadWriteMany): runs, models, data."""
    mount_path: AbsolutePath = "/shared"
    """Its mount path; a relative run.dir is below it."""
    service_account: ResourceName | None = None
    """Service account of the pods."""
    image_pull_secrets: list[ResourceName] = Field(default_factory=list)
    """Secrets with which the image is pulled."""
    rdma: dict[str, Count] = Field(default_factory=dict)
    """RDMA devices of a GPU pod by their resource, for example {rdma/ib: 8}; it may then lock memory."""
    host_network: bool = False
    """GPU pods use their node's network, for fabrics that are not in a pod's."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the GPU nodes."""
    gpu_taint: str | None = "nvidia.com/gpu"
    """Key of the taint of GPU nodes that worker pods tolerate."""
    queue: ResourceName | None = None
    """Queue of a gang scheduler (the label kueue.x-k8s.io/queue-name)."""
    auth: Literal["token", "disabled"] = "token"
    """Whether Ray requires a token; without one, every pod that reaches the head can run code there."""
    auth_secret: ResourceName | None = None
    """Secret with the token (key auth_token); null: the operator makes one for the cluster."""

    checks = (
        _ttl_has_a_shutdown,
        _retries_have_a_submitter,
        _gangs_are_submitted_by_http,
        _a_token_has_authentication,
    )


class AnyscaleConfig(Section):
    head_instance: str = "m5.2xlarge"
    """Instance type of the head node, which has no GPU."""
    worker_instance: str = "p4de.24xlarge"
    """Instance type of the nodes that train and generate."""
    market: Literal["ON_DEMAND", "SPOT", "PREFER_SPOT"] = "ON_DEMAND"
    """Market type of worker nodes."""
    max_retries: NaturalNumber = 2
    """How often a failed job is retried; it resumes from its newest checkpoint."""
    timeout_seconds: Count | None = None
    """Deadline of one attempt."""
    storage: AbsolutePath = "/mnt/cluster_storage"
    """Parent folder of a relative run.dir."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the job."""


class SlurmConfig(Section):
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    time: Annotated[
        str, Field(pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$"), Wanted("[days-]hours[:minutes[:seconds]]")
    ] = "2-00:00:00"
    """Time limit."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that every node runs first (modules, an environment)."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 6379
    """Port of the head; those of its services follow it."""


class LaunchConfig(Section):
    image: str = "rayrlhf:latest"
    """Container image with this repository installed (kuberay, anyscale)."""
    gpus_per_node: NaturalNumber = 8
    """GPUs of a node; 0 for a cluster of CPUs."""
    cpus_per_node: Count = 96
    """CPUs of a node."""
    memory_per_node: Quantity = "1Ti"
    """Memory of a node."""
    shared_memory: Quantity = "128Gi"
    """Size of /dev/shm, which holds Ray's object store (weights in transfer included)."""
    head_cpus: Count = 8
    """CPUs of the head node, which runs the driver, Serve's controller and Ray Data."""
    head_memory: Quantity = "32Gi"
    """Memory of the head node."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process; no secrets: they are written to the rendered files."""
    env_from_secret: dict[VariableName, SecretName] = Field(default_factory=dict)
    """Variables such as HF_TOKEN, each with the secret (name or name/key) that holds its value."""
    kuberay: KubeRayConfig = KubeRayConfig()
    """Kubernetes with KubeRay."""
    anyscale: AnyscaleConfig = AnyscaleConfig()
    """Anyscale."""
    slurm: SlurmConfig = SlurmConfig()
    """Slurm."""

    checks = (_no_secret_is_written_down, _a_variable_has_one_source)
