"""Run a sweep with Ray Tune: resumable, and no trial that fails ends it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.logger import JsonLoggerCallback

from mobula import artifacts, environment, methods, training
from mobula.cluster.connect import connect
from mobula.cluster.spec import ClusterSpec, Tune
from mobula.errors import ClusterError, ConfigError
from mobula.experiment import Run
from mobula.tuning import report as reports
from mobula.tuning import search
from mobula.tuning import space as spaces
from mobula.tuning.report import Outcome
from mobula.tuning.space import Point, Space, SpaceConfig
from mobula.tuning.trials import Measurement, Trials, train

log = logging.getLogger(__name__)

# A distributed trial only waits for its workers. Tune refuses a trial without resources, and with a whole
# CPU each, trials that wait for workers could hold every CPU their workers need.
DRIVER_CPUS = 0.01


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, every trial in order of its start, and the indices on the Pareto front."""

    directory: Path
    outcomes: list[Outcome]
    front: list[int]


def sweep(
    space_path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: ClusterSpec | None = None,
    resume: str = "auto",
) -> SweepResult:
    """Run the sweep of a space file in the directory ``out``; the same command goes on with an interrupted one.

    ``out`` must be shared by all nodes of a cluster.
    ``resume`` is that of :meth:`mobula.experiment.Run.open`. A failed trial is run again by a resumed sweep.

    Raises:
        ConfigError: unknown keys, values the experiment refuses, a space without an allowed point.
        RunConflict: ``out`` holds a finished sweep, or one of another space, experiment or artifact.
        ClusterError: a trial wants more than the cluster has.
        SweepFailed: no trial succeeded; the sweep stays unfinished.
    """
    space = spaces.load(Path(space_path), list(overrides))
    points = [] if space.config.searcher == "optuna" else space.points()
    with connect():
        limits = _limits(space.config, cluster)
        return _in_run(space, points, limits, Path(out), resume, cluster)


def _in_run(
    space: Space, points: list[Point], limits: Tune, out: Path, resume: str, cluster: ClusterSpec | None
) -> SweepResult:
    with Run.open(out, space.config, resume=resume) as run:
        run.bind("experiment", {name: value for name, value in space.base.items() if name != "about"})
        run.bind("objectives", list(space.config.objectives))
        artifact = _artifact(space, run, cluster) if space.config.mode == "inference" else None
        trials = _trials(space, run, artifact)
        outcomes = _run(space, points, trials, limits, run)
        return SweepResult(run.directory, outcomes, reports.write(run, space, outcomes))


def _limits(config: SpaceConfig, cluster: ClusterSpec | None) -> Tune:
    """Resources of a trial and how many run at a time: the space's own, else the cluster's."""
    default = cluster.platform.tune if cluster else Tune()
    distributed = config.mode == "distributed"
    limits = Tune(
        concurrent_trials=config.concurrent or default.concurrent_trials,
        cpus_per_trial=DRIVER_CPUS if distributed else config.cpus or default.cpus_per_trial,
        gpus_per_trial=0.0 if distributed else default.gpus_per_trial if config.gpus is None else config.gpus,
    )
    if cluster is None:
        # A cluster that scales may still get what it lacks now; its own check knows the node types.
        _check_fits(limits)
    return limits


def _check_fits(limits: Tune) -> None:
    has = ray.cluster_resources()
    for name, wanted in (("CPU", limits.cpus_per_trial), ("GPU", limits.gpus_per_trial)):
        if wanted > has.get(name, 0.0):
            raise ClusterError(
                f"a trial wants {wanted:g} {name}, the cluster has {has.get(name, 0.0):g}; "
                f"lower {name.lower()}s in the space, or connect to a larger cluster"
            )


def _artifact(space: Space, run: Run, cluster: ClusterSpec | None) -> Path:
    """The artifact that every trial measures: the given one, or that of a run under ``training/``."""
    given = space.config.artifact
    directory = Path(given).resolve() if given else run.directory / "training" / "artifact"
    if not given and not (directory.parent / "report.json").is_file():
        log.info("training the artifact that all trials share")
        _train_once(space, directory.parent, cluster)
    artifact = artifacts.open_artifact(directory)
    if artifact.method != space.config.method:
        problem = f"artifact {given} is one of {artifact.method}, but the experiment's method is {space.config.method}"
        raise ConfigError([problem], space.config.name)
    run.bind("artifact", artifacts.sha256(directory / artifacts.MANIFEST))
    return directory


def _train_once(space: Space, directory: Path, cluster: ClusterSpec | None) -> None:
    with Run.open(directory, space.experiment({}), cluster=cluster) as run, training.group(cluster, run.id):
        report = methods.get(run.config.method).run(run)
        artifacts.write_json(directory / "report.json", report.to_dict())


def _trials(space: Space, run: Run, artifact: Path | None) -> Trials:
    config = space.config
    required = list(config.objectives)
    if config.scheduler == "asha":
        required.append(config.asha.unit)
    module = methods.METHODS[config.method].module
    limit = config.asha.limit if config.scheduler == "asha" else None
    return Trials(module, space.base, tuple(required), limit, run.directory / "trials", artifact)


def _run(space: Space, points: list[Point], trials: Trials, limits: Tune, run: Run) -> list[Outcome]:
    environment.tune_environment()
    trainable = tune.with_parameters(Measurement if space.config.mode == "inference" else train, trials=trials)
    resources = {"CPU": limits.cpus_per_trial, "GPU": limits.gpus_per_trial}
    tuner = _tuner(space, points, tune.with_resources(trainable, resources), limits.concurrent_trials, run)
    results = tuner.fit()
    return [_outcome(results[i], trials) for i in range(len(results))]


def _tuner(space: Space, points: list[Point], trainable: Any, concurrent: int, run: Run) -> tune.Tuner:
    """A new Tuner, or the interrupted one. Before Tune's first snapshot there is nothing to restore."""
    state = run.directory / "tune"
    if any(state.glob("experiment_state-*.json")):
        log.info("going on with the sweep in %s", run.directory)
        return tune.Tuner.restore(str(state), trainable=trainable, resume_errored=True)
    shutil.rmtree(state, ignore_errors=True)
    parameters, config = search.tune_config(space, points, concurrent)
    return tune.Tuner(
        trainable,
        param_space=parameters,
        tune_config=config,
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(run.directory),
            # Tune reads a restored trial's metrics back from what this logger writes.
            callbacks=[JsonLoggerCallback(), _Progress(len(points) or space.config.trials)],
            # A measurement has no state; what a training trial resumes from lies in its own folder.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


class _Progress(tune.Callback):
    """A line of log for every trial that ends."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.ended = 0

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tune's hook for a trial that ended by itself or was stopped."""
        self._line(trial, str((trial.last_result or {}).get("metrics", "")))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tune's hook for a trial that failed."""
        self._line(trial, "failed")

    def _line(self, trial: Any, what: str) -> None:
        self.ended += 1
        log.info("trial %d of %s: %s %s", self.ended, self.total, trial.config["point"], what)


def _outcome(result: Any, trials: Trials) -> Outcome:
    point = result.config["point"]
    reported = result.metrics or {}
    folder = trials.at(point).relative_to(trials.folder.parent)
    metrics, seconds = reported.get("metrics", {}), reported.get("seconds", 0.0)
    history = trials.history(point)
    if result.error is not None:
        why = trials.error(point) or "the trial's process died"
        return Outcome(point, "failed", metrics, seconds, str(folder), why, history)
    # ASHA stops a trial that has reached the limit before it can keep its result.
    ended = trials.kept(point) or (trials.limit is not None and metrics[trials.required[-1]] >= trials.limit)
    status = "completed" if ended else "stopped"
    return Outcome(point, status, metrics, seconds, str(folder), None, history)
