"""cluster.yaml: a `ray up` file whose ``metadata`` holds what the platform needs, typed and checked.

The Serve part keeps Ray's own schema and is checked against it in :mod:`mobula.serving.schema`; here only what
it asks of the nodes is read.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobula import config as configs
from mobula.config import key, section
from mobula.errors import ConfigError

DEFAULT = Path("cluster.yaml")


@dataclass
class NodeType:
    """A kind of node: what one of them has, and how many there may be."""

    cpus: int = key(1, "CPU cores of a node", ge=1)
    gpus: int = key(0, "accelerators of a node", ge=0)
    memory_gb: float = key(4.0, "memory of a node, GiB", gt=0)
    min: int = key(1, "nodes that always run", ge=0)
    max: int = key(1, "nodes at most", ge=1)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        return [] if self.min <= self.max else [f"min={self.min} is above max={self.max}"]


@dataclass
class Train:
    """Workers of one training job."""

    workers: int = key(1, "Ray Train workers", ge=1)
    cpus_per_worker: float = key(1.0, "CPU cores of a worker", gt=0)
    gpus_per_worker: float = key(0.0, "accelerators of a worker", ge=0)


@dataclass
class Tune:
    """Trials of one sweep."""

    concurrent_trials: int = key(1, "trials that run at the same time", ge=1)
    cpus_per_trial: float = key(1.0, "CPU cores of a trial", gt=0)
    gpus_per_trial: float = key(0.0, "accelerators of a trial", ge=0)


@dataclass
class Kubernetes:
    """What the KubeRay manifests need beside the nodes."""

    image: str = key("mobula:0.1.0", "image with Ray, mobula, jobs/ and serve_apps/")
    namespace: str = key("default", "namespace of the manifests")
    key_secret: str = key("mobula-api-key", "Secret whose entry `key` holds the API key of the endpoints")
    storage_claim: str = key("mobula-storage", "PersistentVolumeClaim mounted at metadata.storage")


@dataclass
class Platform:
    """The ``metadata`` of cluster.yaml."""

    storage: str = key("runs", "directory of runs and checkpoints; absolute and shared with several nodes")
    nodes: dict[str, Any] = key({"head": {}}, "node types by name; one must be called head")
    train: Train = section(Train)
    tune: Tune = section(Tune)
    haproxy: bool = key(False, "put HAProxy in front of Serve (RAY_SERVE_ENABLE_HA_PROXY)")
    kubernetes: Kubernetes = section(Kubernetes)
    serve: dict[str, Any] = key({}, "the Serve deployment in Ray's schema (ServeDeploySchema)")


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster file, read and checked: ``launcher`` is Ray's part, ``platform`` is ours."""

    path: Path
    launcher: dict[str, Any]
    platform: Platform
    nodes: dict[str, NodeType]

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.launcher["cluster_name"]

    @property
    def serve(self) -> dict[str, Any]:
        """The Serve deployment in Ray's schema, as the file has it."""
        return copy.deepcopy(self.platform.serve)

    def ray_up(self) -> dict[str, Any]:
        """The whole file for `ray up`; node types take their resources from ``metadata.nodes``."""
        file = copy.deepcopy(self.launcher)
        for name, entry in file.get("available_node_types", {}).items():
            node = self.nodes[name]
            entry.setdefault("resources", _resources(node))
            if name != "head":
                entry.setdefault("min_workers", node.min)
                entry.setdefault("max_workers", node.max)
        return {**file, "metadata": configs.to_dict(self.platform)}


def load(path: Path = DEFAULT, overrides: Sequence[str] = (), overlay: Path | None = None) -> ClusterSpec:
    """Read a cluster file.

    ``overrides`` are ``train.workers=4``-like assignments below ``metadata``; ``overlay`` is a file whose keys
    replace those of ``path``, mapping by mapping (null removes a key).

    Raises:
        ConfigError: with every unknown key, wrong value, request that fits no node type, and whatever Ray's own
            validation of the file says.
    """
    file = configs.read_yaml(path)
    if overlay is not None:
        file = _overlaid(file, configs.read_yaml(overlay))
    metadata = file.pop("metadata", None)
    if not isinstance(metadata, dict):
        raise ConfigError(["metadata is missing; it holds what Mobula needs (train, tune, serve, nodes)"], str(path))
    platform = configs.build(Platform, metadata, overrides, f"{path} (metadata)")
    nodes, problems = _nodes(platform, path)
    if not problems:
        problems = [*_node_types(file, nodes), *_misfits(platform, nodes)]
    if problems:
        raise ConfigError(problems, str(path))
    spec = ClusterSpec(path, file, platform, nodes)
    problems = launcher_problems(spec.ray_up())
    if problems:
        raise ConfigError(problems, str(path))
    return spec


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. A name other than localhost counts as public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def launcher_problems(file: dict[str, Any]) -> list[str]:
    """What Ray's own validation of a `ray up` file says, in one line each."""
    import jsonschema
    from click import ClickException
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # Checked before Ray fills in defaults, because that step fails on wrong keys with a traceback.
        validate_config({"cluster_synced_files": [], "max_workers": 0, **file})
        validate_config({"cluster_synced_files": [], **prepare_config(copy.deepcopy(file))})
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        return [f"{where}: {error.message}" if where else error.message]
    except (ValueError, RuntimeError, ClickException) as error:
        return [" ".join(str(error).split())]
    return []


def serve_requests(serve: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(name, CPU cores, accelerators) that one replica of each deployment asks for."""
    for application in serve.get("applications") or []:
        for deployment in application.get("deployments") or []:
            options = deployment.get("ray_actor_options") or {}
            name = f"serve.{application.get('name')}.{deployment.get('name')}"
            # Serve gives a replica one CPU where nothing is said.
            yield name, float(options.get("num_cpus", 1)), float(options.get("num_gpus", 0))


def _nodes(platform: Platform, path: Path) -> tuple[dict[str, NodeType], list[str]]:
    nodes, problems = {}, []
    for name, values in platform.nodes.items():
        try:
            nodes[name] = configs.build(NodeType, values or {}, source=f"metadata.nodes.{name}")
        except ConfigError as error:
            problems.append(str(error))
    if "head" not in platform.nodes:
        problems.append(f"metadata.nodes has no head (it has {', '.join(platform.nodes) or 'nothing'})")
    return nodes, problems


def _node_types(file: dict[str, Any], nodes: dict[str, NodeType]) -> Iterator[str]:
    for name in file.get("available_node_types") or {}:
        if name not in nodes:
            yield f"available_node_types.{name} is not described{configs.nearest(name, list(nodes))} in metadata.nodes"


def _misfits(platform: Platform, nodes: dict[str, NodeType]) -> Iterator[str]:
    """Requests that no node could ever hold. Whether nodes are free now is for the moment of starting."""
    train, tune = platform.train, platform.tune
    requests = [
        ("train.cpus_per_worker", train.cpus_per_worker, train.gpus_per_worker),
        ("tune.cpus_per_trial", tune.cpus_per_trial, tune.gpus_per_trial),
        *serve_requests(platform.serve),
    ]
    has = ", ".join(f"{name}: {node.cpus} CPU, {node.gpus} GPU" for name, node in nodes.items())
    for name, cpus, gpus in requests:
        if not any(node.cpus >= cpus and node.gpus >= gpus for node in nodes.values()):
            yield f"metadata.{name} asks for {cpus:g} CPU and {gpus:g} GPU, which no node type has ({has})"
    total = sum(node.cpus * node.max for node in nodes.values())
    if train.workers * train.cpus_per_worker > total:
        yield (
            f"metadata.train asks for {train.workers} workers of {train.cpus_per_worker:g} CPU, "
            f"but all nodes together have {total} CPU"
        )


def _resources(node: NodeType) -> dict[str, int]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def _overlaid(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in overlay.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _overlaid(merged[name], value)
        else:
            merged[name] = value
    return merged
