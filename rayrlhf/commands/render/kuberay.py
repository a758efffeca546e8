"""A RayJob for KubeRay (ray.io/v1) and the ConfigMap with the job's config.

Based on KubeRay's sample of distributed PyTorch training. The head has no slots: it runs the driver. Workers
are one group of equal pods, all of which must be up before the run begins.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from rayrlhf.commands.render.host_memory import check_host_memory
from rayrlhf.commands.render.kuberay_rules import broken_rules
from rayrlhf.commands.render.rendering import Rendering, commented, to_yaml
from rayrlhf.config.base import ConfigError, Problem

CONFIG_FOLDER = "/etc/rayrlhf"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def render_kuberay(job: Rendering) -> str:
    """Raises `ConfigError` for what the operator would refuse."""
    kuberay = job.config.launch.kuberay
    manifest = rayjob(job)
    broken = broken_rules(manifest)
    if broken:
        fix = "change launch.kuberay"
        raise ConfigError(
            [Problem("launch.kuberay", rule, "what the operator takes", fix) for rule in broken]
        )
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job),
        "data": {"job.yaml": job.resolved},
    }
    notes = [
        f"kubectl create -f this.yaml; the image has this repository in {kuberay.project_dir},",
        f"and the claim {kuberay.volume_claim} holds runs, models and data under {kuberay.mount_path}.",
    ]
    return commented([*job.header(), *notes]) + to_yaml(config_map, manifest)


def rayjob(job: Rendering) -> dict[str, Any]:
    """Raises `ConfigError` if the pods' memory is less than the plan."""
    check_host_memory(job.config)
    launch, kuberay = job.config.launch, job.config.launch.kuberay
    command = job.command_with(f"{CONFIG_FOLDER}/job.yaml", *job.run_dir(kuberay.mount_path))
    spec: dict[str, Any] = {
        # The folder of the image that contains jobs/.
        "entrypoint": f"cd {kuberay.project_dir} && {command}",
        "submissionMode": kuberay.submission_mode,
        # Each retry is a new cluster; the run resumes from its newest checkpoint.
        "backoffLimit": kuberay.backoff_limit,
        "shutdownAfterJobFinishes": kuberay.shutdown_after_job_finishes,
    }
    if job.env:
        spec["runtimeEnvYAML"] = to_yaml({"env_vars": job.env})
    if kuberay.submission_mode != "InteractiveMode":
        spec["entrypointNumCpus"] = 1
    if kuberay.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = kuberay.active_deadline_seconds
    if kuberay.ttl_seconds_after_finished:
        spec["ttlSecondsAfterFinished"] = kuberay.ttl_seconds_after_finished
    metadata = _metadata(job)
    if kuberay.queue is not None:
        metadata["labels"] = {QUEUE_LABEL: kuberay.queue}
        spec["suspend"] = True  # the queue releases it when all of it can be scheduled
    auth = {"mode": kuberay.auth, **({"secretName": kuberay.auth_secret} if kuberay.auth_secret else {})}
    spec["rayClusterSpec"] = {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": auth,
        "headGroupSpec": {
            # The pod's address, where the operator reaches the job server.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-gpus": "0"},
            "template": _pod(job, "head", launch.head_cpus, launch.head_memory, gpus=0),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if job.nodes.gpus else "cpu",
                "replicas": job.nodes.count,
                "minReplicas": job.nodes.count,
                "maxReplicas": job.nodes.count,
                "rayStartParams": {},
                "template": _pod(job, "worker", job.nodes.cpus, job.nodes.memory, gpus=job.nodes.gpus),
            }
        ],
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _metadata(job: Rendering) -> dict[str, Any]:
    return {"name": job.name, "namespace": job.config.launch.kuberay.namespace}


def _pod(job: Rendering, role: str, cpus: int, memory: str, *, gpus: int) -> dict[str, Any]:
    """Requests equal limits: a throttled pod would slow down the whole run."""
    launch, kuberay = job.config.launch, job.config.launch.kuberay
    resources: dict[str, Any] = {"cpu": str(cpus), "memory": memory}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
        resources |= {name: str(count) for name, count in kuberay.rdma.items()}
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "shared", "mountPath": kuberay.mount_path},
    ]
    volumes: list[dict[str, Any]] = [
        # The container's own /dev/shm has 64 MB; Ray's object store would go to the disk.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": launch.shared_memory}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": kuberay.volume_claim}},
    ]
    if role == "head":
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER})
        volumes.append({"name": "config", "configMap": {"name": job.name}})
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": launch.image,
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": mounts,
    }
    if gpus and kuberay.rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    container["env"] = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
        for variable, (name, key) in job.secrets.items()
    ]
    if "HF_HOME" not in {*job.env, *job.secrets}:  # one cache of the hub for all pods, and for the next run
        container["env"].append({"name": "HF_HOME", "value": f"{kuberay.mount_path}/huggingface"})
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if kuberay.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in kuberay.image_pull_secrets]
    if gpus and kuberay.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if role == "head" and kuberay.submission_mode == "SidecarMode":
        pod["restartPolicy"] = "Never"
    if kuberay.service_account is not None:
        pod["serviceAccountName"] = kuberay.service_account
    if gpus:
        if kuberay.node_selector:
            pod["nodeSelector"] = kuberay.node_selector
        if kuberay.gpu_taint is not None:
            pod["tolerations"] = [{"key": kuberay.gpu_taint, "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": pod}
