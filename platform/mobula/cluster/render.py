"""What other launchers read, made from cluster.yaml: KubeRay manifests, or the file for `ray up`.

No secret is written: KubeRay makes the token of the cluster (``authOptions``), and the endpoints' API key comes
from a Kubernetes Secret. KubeRay 1.6 or newer is expected (token authentication).
"""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from mobula.cluster.spec import ClusterSpec, NodeType
from mobula.errors import ConfigError

Target = Literal["kuberay", "ray"]
TARGETS = ("kuberay", "ray")
SMOKE = ("python", "jobs/train.py", "jobs/diffugr/smoke.yaml")
ROOT = "/app"


def render(
    spec: ClusterSpec, target: str = "kuberay", *, serve: dict[str, Any] | None = None, job: Sequence[str] = SMOKE
) -> str:
    """YAML for ``target``: RayCluster, RayJob (running ``job``) and RayService, or the file for `ray up`.

    ``serve`` is the checked Serve config (:func:`mobula.serving.schema.check`); without it there is no RayService.

    Raises:
        ConfigError: if the target is unknown.
    """
    if target == "ray":
        return yaml.safe_dump(spec.ray_up(), sort_keys=False)
    if target != "kuberay":
        raise ConfigError([f"target={target!r}: expected one of {', '.join(TARGETS)}"], "cluster render")
    manifests = [_manifest(spec, "RayCluster", _cluster(spec)), _manifest(spec, "RayJob", _job(spec, job))]
    if serve is not None:
        manifests.append(_manifest(spec, "RayService", _service(spec, serve)))
    return yaml.safe_dump_all(manifests, sort_keys=False)


def _manifest(spec: ClusterSpec, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "name": f"{spec.name}-{kind.removeprefix('Ray').lower()}",
        "namespace": spec.platform.kubernetes.namespace,
    }
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": body}


def _cluster(spec: ClusterSpec) -> dict[str, Any]:
    workers = {name: node for name, node in spec.nodes.items() if name != "head"}
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": any(node.min < node.max for node in workers.values()),
        "headGroupSpec": {
            # KubeRay reaches the job API through a Service; the token guards it (authOptions).
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "template": _pod(spec, "ray-head", spec.nodes["head"]),
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": node.min,
                "minReplicas": node.min,
                "maxReplicas": node.max,
                "rayStartParams": {},
                "template": _pod(spec, "ray-worker", node),
            }
            for name, node in workers.items()
        ],
    }


def _job(spec: ClusterSpec, job: Sequence[str]) -> dict[str, Any]:
    environment = {"working_dir": f"file://{ROOT}", "env_vars": {"PYTHONPATH": f"{ROOT}/platform"}}
    return {
        "entrypoint": shlex.join(job),
        "runtimeEnvYAML": yaml.safe_dump(environment, sort_keys=False),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(spec),
    }


def _service(spec: ClusterSpec, serve: dict[str, Any]) -> dict[str, Any]:
    return {"serveConfigV2": yaml.safe_dump(in_a_pod(serve), sort_keys=False), "rayClusterConfig": _cluster(spec)}


def in_a_pod(serve: dict[str, Any]) -> dict[str, Any]:
    """The Serve config for Kubernetes: a Service cannot reach a pod's loopback, so it is public and wants a key."""
    public = copy.deepcopy(serve)
    public["http_options"]["host"] = "0.0.0.0"
    for application in public["applications"]:
        if "key_required" in application.get("args", {}):
            application["args"]["key_required"] = True
    return public


def _pod(spec: ClusterSpec, container: str, node: NodeType) -> dict[str, Any]:
    kubernetes = spec.platform.kubernetes
    amount = {"cpu": str(node.cpus), "memory": f"{math.ceil(node.memory_gb * 1024)}Mi"}
    if node.gpus:
        amount["nvidia.com/gpu"] = str(node.gpus)
    storage = str(PurePosixPath(ROOT) / spec.platform.storage)
    secret = {"name": kubernetes.key_secret, "key": "key", "optional": True}
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": kubernetes.image,
                    # Relative paths of cluster.yaml are relative to it.
                    "workingDir": ROOT,
                    "resources": {"requests": dict(amount), "limits": dict(amount)},
                    "env": [
                        {"name": "PYTHONPATH", "value": f"{ROOT}/platform:{ROOT}"},
                        {"name": "MOBULA_API_KEY", "valueFrom": {"secretKeyRef": secret}},
                    ],
                    "volumeMounts": [{"name": "storage", "mountPath": storage}],
                }
            ],
            "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": kubernetes.storage_claim}}],
        }
    }
