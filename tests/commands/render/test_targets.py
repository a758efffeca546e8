"""What is rendered is what the launchers take, and the examples in cluster/ are fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rayrlhf.commands.render.kuberay_rules import broken_rules
from rayrlhf.commands.render.rendering import rendering_of
from rayrlhf.commands.render.sizing import nodes_of
from rayrlhf.commands.render.targets import TARGETS, main
from rayrlhf.config.job_kinds import load_any

REPOSITORY = Path(__file__).parents[3]
CLUSTER = REPOSITORY / "cluster"
PPO = "jobs/configs/ppo-8x-gpu.yaml"
SHIPPED = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "jobs/configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def render(target: str, *argv: str) -> str:
    return TARGETS[target](rendering_of(load_any(argv), list(argv)))


def rayjob(*argv: str) -> dict[str, Any]:
    [config_map, manifest] = yaml.safe_load_all(render("kuberay", *argv))
    assert config_map["metadata"] == {k: manifest["metadata"][k] for k in ("name", "namespace")}
    return manifest


def schema(path: str) -> Any:
    return json.loads((CLUSTER / path).read_text())


@pytest.mark.parametrize("config", SHIPPED)
@pytest.mark.parametrize("mode", ["HTTPMode", "K8sJobMode", "SidecarMode"])
def test_kuberay_takes_every_shipped_config(config: str, mode: str) -> None:
    manifest = rayjob(config, f"launch.kuberay.submission_mode={mode}")
    jsonschema.validate(manifest, schema("kuberay/rayjob.schema.json"))
    assert broken_rules(manifest) == []


@pytest.mark.skipif("RAYJOB_CRD" not in os.environ, reason="RAYJOB_CRD: a file with KubeRay's own RayJob CRD")
def test_kuberays_own_crd_takes_it_too() -> None:
    crd = yaml.safe_load(Path(os.environ["RAYJOB_CRD"]).read_text())
    [whole] = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    for config in SHIPPED:
        jsonschema.validate(rayjob(config), whole)


def test_the_schema_refuses_what_the_crd_does_not_know() -> None:
    manifest = rayjob(PPO)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replcas"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replcas"):
        jsonschema.validate(manifest, schema("kuberay/rayjob.schema.json"))


def test_a_rayjob_by_hand() -> None:
    """Eight slots of eight CPUs and a GPU on nodes of four GPUs: two workers; the driver is on the head."""
    spec = rayjob(PPO, "launch.gpus_per_node=4", "launch.cpus_per_node=40")["spec"]
    assert (
        spec["entrypoint"] == "cd /rayrlhf && python jobs/ppo.py /etc/rayrlhf/job.yaml run.dir=/shared/runs"
    )
    assert (spec["submissionMode"], spec["backoffLimit"]) == ("HTTPMode", 2)
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 2, 2)
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "40", "memory": "1Ti", "nvidia.com/gpu": "4"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    volumes = {volume["name"]: volume for volume in workers["template"]["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "128Gi"}
    [head] = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert {"name": "config", "mountPath": "/etc/rayrlhf"} in head["volumeMounts"]


def test_pods_of_a_cluster_with_rdma_and_a_private_image() -> None:
    changes = ["image_pull_secrets=[pull]", "rdma={rdma/ib: 8}", "host_network=true"]
    spec = rayjob(PPO, *(f"launch.kuberay.{change}" for change in changes))["spec"]["rayClusterSpec"]
    [workers], head = spec["workerGroupSpecs"], spec["headGroupSpec"]
    pods = [each["template"]["spec"] for each in (workers, head)]
    assert [pod["imagePullSecrets"] for pod in pods] == [[{"name": "pull"}]] * 2
    [worker], [driver] = (pod["containers"] for pod in pods)
    assert worker["resources"]["limits"]["rdma/ib"] == "8"
    assert worker["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert (pods[0]["hostNetwork"], pods[0]["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert "rdma/ib" not in driver["resources"]["limits"] and "hostNetwork" not in pods[1]
    assert {"name": "HF_HOME", "value": "/shared/huggingface"} in worker["env"]
    own = rayjob(PPO, "launch.env={HF_HOME: /cache}")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert own["template"]["spec"]["containers"][0]["env"] == []


def test_the_shipped_config_is_the_resolved_one(tmp_path: Path) -> None:
    [config_map, _] = yaml.safe_load_all(render("kuberay", PPO, "train.lr=1e-7"))
    (tmp_path / "job.yaml").write_text(config_map["data"]["job.yaml"])
    assert load_any([str(tmp_path / "job.yaml")]) == load_any([PPO, "train.lr=1e-7"])


HEALTHY: dict[str, Any] = {"rayClusterSpec": {"headGroupSpec": {}}, "shutdownAfterJobFinishes": True}


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 5}, "ttlSecondsAfterFinished needs"),
        ({"deletionStrategy": {"deletionRules": [{}]}}, "deletionRules exclude"),
        ({"shutdownAfterJobFinishes": False, "suspend": True}, "suspend needs"),
        ({"suspend": True, "clusterSelector": {"a": "b"}}, "suspend excludes clusterSelector"),
        ({"backoffLimit": 1, "clusterSelector": {"a": "b"}}, "backoffLimit excludes clusterSelector"),
        ({"backoffLimit": 1, "submissionMode": "InteractiveMode"}, "backoffLimit excludes InteractiveMode"),
        ({"rayClusterSpec": {}}, "rayClusterSpec or clusterSelector"),
        ({"submissionMode": "SidecarMode", "submitterPodTemplate": {}}, "excludes submitterPodTemplate"),
        ({"submissionMode": "SidecarMode", "submitterConfig": {}}, "excludes submitterConfig"),
        (
            {"submissionMode": "SidecarMode", "clusterSelector": {"a": "b"}},
            "SidecarMode excludes clusterSelector",
        ),
        (
            {"rayClusterSpec": {"rayVersion": "2.51.1", "authOptions": {"mode": "token"}}},
            "mode token needs Ray 2.52",
        ),
        ({"rayClusterSpec": {"authOptions": {"secretName": "mine"}}}, "secretName needs mode token"),
        (
            {
                "submissionMode": "SidecarMode",
                "rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"restartPolicy": "Always"}}}},
            },
            "restartPolicy is Never",
        ),
    ],
)
def test_every_rule_of_the_operator(changes: dict[str, Any], rule: str) -> None:
    assert broken_rules({"spec": HEALTHY}) == []
    assert any(rule in broken for broken in broken_rules({"spec": HEALTHY | changes}))


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["launch.kuberay.shutdown_after_job_finishes=false"], "launch.kuberay.ttl_seconds_after_finished"),
        (["launch.kuberay.submission_mode=InteractiveMode"], "launch.kuberay.backoff_limit"),
        (
            ["launch.kuberay.queue=gpus", "launch.kuberay.submission_mode=K8sJobMode"],
            "launch.kuberay.submission_mode",
        ),
        (["launch.cpus_per_node=4"], "launch.cpus_per_node"),
        (["launch.gpus_per_node=0"], "launch.gpus_per_node"),
        (["launch.memory_per_node=lots"], "launch.memory_per_node"),
        (["launch.env.HF_TOKEN=abc"], "launch.env.HF_TOKEN"),
        (["launch.env.WANDB_API_KEY=abc"], "launch.env.WANDB_API_KEY"),
        (["launch.env.MIRROR=https://me:hunter2@mirror/x"], "launch.env.MIRROR"),
        (["launch.env.NOTE=hf_abcdefghij"], "launch.env.NOTE"),
        (["launch.env_from_secret.HF_TOKEN=hf_AbCdEf"], "launch.env_from_secret.HF_TOKEN"),
        (["launch.env_from_secret.A=b", "launch.env.A=c"], "launch.env_from_secret.A"),
        (["launch.kuberay.auth=disabled", "launch.kuberay.auth_secret=mine"], "launch.kuberay.auth_secret"),
        (["launch.memory_per_node=64Gi"], "launch.memory_per_node"),
        (["launch.shared_memory=8Gi"], "launch.shared_memory"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    overrides: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", "kuberay", PPO, *overrides]) == 2
    assert key in capsys.readouterr().err


def test_kuberay_asks_for_a_token_unless_that_is_switched_off() -> None:
    """Before: every pod that reached the head could run code there."""
    assert rayjob(PPO)["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    own = rayjob(PPO, "launch.kuberay.auth_secret=mine")["spec"]["rayClusterSpec"]
    assert own["authOptions"] == {"mode": "token", "secretName": "mine"}
    without = rayjob(PPO, "launch.kuberay.auth=disabled")["spec"]["rayClusterSpec"]
    assert without["authOptions"] == {"mode": "disabled"}


SECRETS = ("launch.env_from_secret.HF_TOKEN=hub/token", "launch.env_from_secret.WANDB_API_KEY=wandb")


def test_secrets_are_named_in_a_manifest_and_never_written() -> None:
    manifest = rayjob(PPO, *SECRETS, 'launch.env.TOKENIZERS_PARALLELISM="false"')
    jsonschema.validate(manifest, schema("kuberay/rayjob.schema.json"))
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert container["env"] == [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            {
                "name": "WANDB_API_KEY",
                "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}},
            },
            {"name": "HF_HOME", "value": "/shared/huggingface"},
        ]
    assert "HF_TOKEN" not in manifest["spec"]["runtimeEnvYAML"]


@pytest.mark.parametrize("target", ["local", "slurm"])
def test_a_script_ends_at_once_where_a_secret_is_missing(target: str) -> None:
    script = render(target, PPO, *SECRETS)
    environment = {"PATH": os.environ["PATH"], "HF_TOKEN": "there"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "WANDB_API_KEY: set it to the value of wandb; it is written nowhere" in done.stderr
    assert "HF_TOKEN" not in done.stderr


@pytest.mark.parametrize("target", ["anyscale", "ray-job"])
def test_where_a_launcher_has_no_place_for_secrets_the_file_says_so(target: str) -> None:
    comments = [line for line in render(target, PPO, *SECRETS).splitlines() if line.startswith("# ")]
    assert any("HF_TOKEN" in line and "WANDB_API_KEY" in line for line in comments)


@pytest.mark.parametrize("config", SHIPPED)
def test_anyscale_takes_every_shipped_config(config: str) -> None:
    jsonschema.validate(yaml.safe_load(render("anyscale", config)), schema("anyscale/job.schema.json"))


def test_an_anyscale_job_begins_when_its_nodes_are_there() -> None:
    """Its entrypoint starts with the head, and a driver refuses a cluster that is too small."""
    job = yaml.safe_load(render("anyscale", "jobs/configs/ppo-70b-16x-a100-80.yaml"))
    [workers] = job["compute_config"]["worker_nodes"]
    assert workers["min_nodes"] == workers["max_nodes"] == 2
    wait, _, command = job["entrypoint"].partition(" && ")
    assert wait == "python -m rayrlhf.commands.render.wait_for_nodes 3", "the head is a node, too"
    assert command.startswith("python jobs/ppo.py jobs/configs/ppo-70b-16x-a100-80.yaml ")


@pytest.mark.parametrize("target", ["local", "ray-job", "slurm"])
@pytest.mark.parametrize("config", SHIPPED)
def test_scripts_are_sound_bash(target: str, config: str) -> None:
    done = subprocess.run(["bash", "-n"], input=render(target, config), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_the_driver_sets_by_the_cluster_stays_open() -> None:
    argv = ["jobs/configs/ppo-8x-gpu.yaml", "rollout.start_timeout_seconds=900"]
    resolved = yaml.safe_load(rendering_of(load_any(argv), argv).resolved)
    assert "collective_timeout_seconds" not in resolved["train"]
    assert "timeout_seconds" not in resolved["rollout"]
    assert resolved["rollout"]["start_timeout_seconds"] == 900


def test_chains_are_sized_by_their_largest_stage() -> None:
    """Seven engines and a reward model generate; eight workers train."""
    config = load_any(["jobs/configs/rejection_sampling-8x-gpu.yaml"])
    assert nodes_of(config).count == 1
    assert (
        nodes_of(load_any(["jobs/configs/rejection_sampling-8x-gpu.yaml", "rollout.num_engines=15"])).count
        == 2
    )


def test_the_examples_are_fresh(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        [CLUSTER / "render.sh"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 11
    for path in made:
        assert (CLUSTER / path).read_text() == (tmp_path / path).read_text(), (
            f"cluster/{path}: run `make rendered`"
        )


def test_it_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rayrlhf.commands.cli import main; "
        f"main(['render', '--target', 'slurm', {PPO!r}]); "
        "raise SystemExit(str({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_id_with_a_revision_is_no_type_with_a_path() -> None:
    script = render("ray-job", PPO, "model.path=owner/name@v1.0")
    assert '"model.path=$(absolute owner/name@v1.0)"' in script
