"""``fit`` and ``fit_all``: train tasks, each in a directory, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobula.artifacts import write_json
from mobula.cluster.resources import WorkerResources, process_device
from mobula.cluster.spec import ClusterSpec, Train
from mobula.config import differences
from mobula.errors import ArtifactError, ConfigError, RunConflict
from mobula.training import checkpoints, loop
from mobula.training.config import TrainingConfig
from mobula.training.group import Group, group
from mobula.training.ray_backend import Work
from mobula.training.task import Task

FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class FitResult:
    """What a finished training left in its directory.

    ``weights`` are the best ones by the monitored metric, or the last ones if none is monitored; ``best`` holds
    that evaluation's step and metrics. ``seconds`` counts interrupted attempts up to their last checkpoint. A trial
    that ``diverged`` ended at the step whose loss was not finite.
    """

    weights: Path
    last: Path
    steps: int
    examples: int
    seconds: float
    best: dict[str, Any]
    history: Path
    diverged: bool = False


@dataclass(frozen=True)
class Training:
    """A task to train with its settings, seed and directory; ``progress`` is called with every row of metrics.

    An error that ``progress`` raises ends the training. ``name`` is shown in logs and errors. On several nodes the
    directory must be on storage that all of them see. A ``trial`` of some setting may fail: a loss that is not finite
    ends it, and nothing else. It needs a monitored metric, by which its weights until then are judged.
    """

    task: Task
    config: TrainingConfig
    directory: Path
    seed: int
    name: str
    progress: Callable[[dict[str, Any]], None] | None = None
    trial: bool = False


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
    """Train one task; see :func:`fit_all` and :class:`Training`."""
    return fit_all([Training(task, config, directory, seed, name, progress)], cluster)[0]


def fit_all(trainings: Sequence[Training], cluster: ClusterSpec | None = None) -> list[FitResult]:
    """Train one after another, each in its directory; go on where an interrupted call stopped.

    ``cluster`` says what a worker gets, and how many there are unless ``config.workers`` does; without one it is that
    of the open group. A start of the workers costs more than a small training does: those of the run's open
    :func:`~mobula.training.group.group` are used, or else all trainings of this call share one.

    Raises:
        ConfigError: the keys of a config contradict each other.
        RunConflict: a directory holds another training, or another process trains there.
        ClusterError: the cluster cannot give what the workers need.
        TrainingError: a loss is not finite, workers were lost too often, or the storage refuses.
        ArtifactError: the checkpoint to resume from is damaged.
    """
    with group(cluster) as standing:
        cluster = cluster or standing.cluster
        requested = cluster.platform.train if cluster else Train(workers=0)
        trainings = [_resolved(training, requested) for training in trainings]
        for training in trainings:
            if not (training.directory / loop.RESULT).is_file():
                _train(training, requested, standing)
    return [_result(training.directory) for training in trainings]


def _train(training: Training, requested: Train, standing: Group) -> None:
    """Train in this process, or on the group's workers."""
    t, progress = training, training.progress or _silent
    if t.config.workers == 0:
        loop.train(t.task, t.config, t.directory, t.seed, process_device(), progress, t.trial)
        return
    resources = WorkerResources(t.config.world, requested.cpus_per_worker, requested.gpus_per_worker)
    standing.train(Work(t.task, t.config, t.directory, t.seed, t.trial), t.name, resources, progress)


def _resolved(training: Training, requested: Train) -> Training:
    """The training with its number of workers and its absolute directory, which is then its own."""
    config = training.config
    if config.workers is None:
        config = replace(config, workers=requested.workers)
    problems = [f"training.{problem}" for problem in config.problems()]
    if training.trial and not config.monitor:
        problems.append("training.monitor: a trial needs a metric that judges it")
    if problems:
        raise ConfigError(problems, training.name)
    directory = training.directory.resolve()
    _bind(directory, {"task": training.task.identity(), "seed": training.seed, "training": config.identity()})
    return replace(training, config=config, directory=directory)


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
        diverged=facts.get("diverged", False),
    )


def _silent(row: dict[str, Any]) -> None:
    """No progress is shown."""
