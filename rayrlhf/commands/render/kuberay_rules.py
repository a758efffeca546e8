"""Checks of KubeRay's operator on a RayJob beyond its schema (KubeRay 1.7, validation of RayJob)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def broken_rules(rayjob: Mapping[str, Any]) -> list[str]:
    """A sentence for every rule that this manifest breaks."""
    spec: Mapping[str, Any] = rayjob["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    shuts_down = bool(spec.get("shutdownAfterJobFinishes"))
    has_ttl = spec.get("ttlSecondsAfterFinished", 0) > 0
    has_rules = bool((spec.get("deletionStrategy") or {}).get("deletionRules"))
    retries = spec.get("backoffLimit", 0) > 0
    cluster = spec.get("rayClusterSpec") or {}
    auth = cluster.get("authOptions") or {}
    head = cluster.get("headGroupSpec") or {}
    restart = ((head.get("template") or {}).get("spec") or {}).get("restartPolicy")
    sidecar = mode == "SidecarMode"
    rules = {
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": has_ttl and not shuts_down,
        "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished": has_rules
        and (shuts_down or has_ttl),
        "suspend needs shutdownAfterJobFinishes": bool(spec.get("suspend")) and not shuts_down,
        "suspend excludes clusterSelector": bool(spec.get("suspend")) and bool(spec.get("clusterSelector")),
        "backoffLimit excludes clusterSelector": retries and bool(spec.get("clusterSelector")),
        "backoffLimit excludes InteractiveMode": retries and mode == "InteractiveMode",
        "rayClusterSpec or clusterSelector must be given": not spec.get("rayClusterSpec")
        and not spec.get("clusterSelector"),
        "SidecarMode excludes submitterPodTemplate": sidecar and "submitterPodTemplate" in spec,
        "SidecarMode excludes submitterConfig": sidecar and "submitterConfig" in spec,
        "SidecarMode excludes clusterSelector": sidecar and bool(spec.get("clusterSelector")),
        "authOptions.mode token needs Ray 2.52": auth.get("mode") == "token"
        and _minor(cluster.get("rayVersion", "")) < (2, 52),
        "authOptions.secretName needs mode token": "secretName" in auth and auth.get("mode") != "token",
        "SidecarMode needs a head whose restartPolicy is Never or unset": sidecar
        and restart not in (None, "Never"),
    }
    return [rule for rule, broken in rules.items() if broken]


def _minor(version: str) -> tuple[int, int]:
    """(major, minor); (0, 0) for an invalid version."""
    parts = version.split(".")
    numbers = [int(part) for part in parts[:2] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
