"""``fit``: train a task in a directory, once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobula.artifacts import write_json
from mobula.cluster.resources import WorkerResources
from mobula.cluster.spec import ClusterSpec, Train
from mobula.config import differences
from mobula.errors import ArtifactError, ConfigError, RunConflict
from mobula.training import checkpoints, loop, ray_backend
from mobula.training.config import TrainingConfig
from mobula.training.task import Task

FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class FitResult:
    """What a finished training left in its directory.

    ``weights`` are the best ones by the monitored metric, or the last ones if none is monitored; ``best`` holds
    that evaluation's step and metrics. ``seconds`` counts interrupted attempts up to their last checkpoint.
    """

    weights: Path
    last: Path
    steps: int
    examples: int
    seconds: float
    best: dict[str, Any]
    history: Path


def fit(
    task: Task,
    config: TrainingConfig,
    directory: Path,
    *,
    seed: int,
    name: str,
    cluster: ClusterSpec | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train ``task`` in ``directory``; go on where an interrupted call stopped; return a finished one's result.

    ``cluster`` says what a worker gets, and how many there are unless ``config.workers`` does. ``name`` is shown
    in Ray's dashboard and in errors. ``progress`` is called with every row of metrics. On several nodes the
    directory must be on storage that all of them see.

    Raises:
        ConfigError: the keys of ``config`` contradict each other.
        RunConflict: the directory holds another training, or another process trains there.
        ClusterError: the cluster cannot give what the workers need.
        TrainingError: the loss is not finite, workers were lost too often, or the storage refuses.
        ArtifactError: the checkpoint to resume from is damaged.
    """
    requested = cluster.platform.train if cluster else Train(workers=0)
    if config.workers is None:
        config = dataclasses.replace(config, workers=requested.workers)
    resources = WorkerResources(config.world, requested.cpus_per_worker, requested.gpus_per_worker)
    problems = [f"training.{problem}" for problem in config.problems()]
    if problems:
        raise ConfigError(problems, name)
    directory = directory.resolve()
    _bind(directory, {"task": task.identity(), "seed": seed, "training": config.identity()})
    if not (directory / loop.RESULT).is_file():
        report = progress or _silent
        if config.workers == 0:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            loop.train(task, config, directory, seed, device, report)
        else:
            ray_backend.train(task, config, directory, seed, name, resources, report)
    return _result(directory)


def _bind(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Make the directory this training's own."""
    path = directory / FINGERPRINT
    if path.is_file():
        changed = differences(json.loads(path.read_text(encoding="utf-8")), fingerprint)
        if changed:
            raise RunConflict(
                f"{directory}: holds another training ({'; '.join(changed[:6])}); "
                "use another directory, or remove this one"
            )
        return
    with checkpoints.writing(path):
        write_json(path, fingerprint)


def _result(directory: Path) -> FitResult:
    facts = json.loads((directory / loop.RESULT).read_text(encoding="utf-8"))
    if not (directory / loop.WEIGHTS).is_file():
        raise ArtifactError(
            f"{directory}: training is finished but {loop.WEIGHTS} is gone; remove the directory to train again"
        )
    return FitResult(
        weights=directory / loop.WEIGHTS,
        last=directory / facts["last"],
        steps=facts["steps"],
        examples=facts["examples"],
        seconds=facts["seconds"],
        best=facts["best"],
        history=directory / loop.METRICS,
    )


def _silent(row: dict[str, Any]) -> None:
    """No progress is shown."""
