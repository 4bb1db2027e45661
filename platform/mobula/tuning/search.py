"""How the next point is chosen and when a trial stops: Tune's parts, made from a space."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mobula.config import digest
from mobula.tuning.space import Point, Space

# Suggestions in a row that may be refused or repeat a point before the search ends.
PATIENCE = 200
METRICS = "metrics/"


class OptunaPoints(Searcher):
    """TPE (Bergstra et al. 2011; its multi-objective form where there are several) over the allowed points.

    Unlike Tune's own wrapper it passes over points that the space refuses or that were suggested before,
    so neither costs a trial.
    """

    def __init__(self, space: Space, metrics: list[str], modes: list[str]) -> None:
        super().__init__()
        self.space = space
        self.metrics = metrics
        self.distributions = {name: _distribution(domain) for name, domain in space.config.parameters.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in modes]
        self.study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=space.config.seed), directions=directions
        )
        self.running: dict[str, optuna.trial.Trial] = {}
        self.seen: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """The next point, or FINISHED when no new one turns up."""
        for _ in range(PATIENCE):
            trial = self.study.ask(self.distributions)
            point = self._point(trial)
            if digest(point) not in self.seen and self.space.allows(point):
                self.running[trial_id] = trial
                self.seen.add(digest(point))
                return {"point": point}
            self.study.tell(trial, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study what a trial reached; a failed one teaches it nothing."""
        trial = self.running.pop(trial_id)
        if error or not result:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, [result[name] for name in self.metrics])

    def save(self, checkpoint_path: str) -> None:
        """Keep the state of the search beside Tune's snapshot."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a kept state. It lies in the sweep's own directory, which only its owner writes."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))

    def _point(self, trial: optuna.trial.Trial) -> Point:
        parameters = self.space.config.parameters
        return {
            name: parameters[name]["choice"][value] if "choice" in parameters[name] else value
            for name, value in trial.params.items()
        }


def tune_config(space: Space, points: list[Point], concurrent: int) -> tuple[dict[str, Any], tune.TuneConfig]:
    """Tune's parameter space and configuration for a sweep. ``points`` is empty for an adaptive search."""
    config = space.config
    adaptive = config.searcher == "optuna"
    parameters = {} if adaptive else {"point": tune.grid_search(points)}
    return parameters, tune.TuneConfig(
        search_alg=_optuna(space) if adaptive else None,
        scheduler=_scheduler(space),
        num_samples=config.trials if adaptive and config.trials else 1,
        max_concurrent_trials=concurrent,
        # A process that has imported torch takes the next trial: its start costs seconds.
        reuse_actors=config.mode != "distributed",
    )


def _optuna(space: Space) -> OptunaPoints:
    """All objectives; with ASHA, which follows one metric, the first alone."""
    used = list(space.config.objectives.items())[: 1 if space.config.scheduler == "asha" else None]
    return OptunaPoints(space, [METRICS + metric for metric, _ in used], [mode for _, mode in used])


def _scheduler(space: Space) -> TrialScheduler:
    if space.config.scheduler == "none":
        return FIFOScheduler()
    asha = space.config.asha
    metric, mode = next(iter(space.config.objectives.items()))
    return ASHAScheduler(
        time_attr=METRICS + asha.unit,
        metric=METRICS + metric,
        mode=mode,
        max_t=asha.limit,
        grace_period=asha.grace,
        reduction_factor=asha.reduction,
    )


def _distribution(domain: dict[str, Any]) -> BaseDistribution:
    kind, values = next(iter(domain.items()))
    if kind == "choice":
        # By index: a value may be a list, which Optuna does not take.
        return CategoricalDistribution(range(len(values)))
    low, high = values
    if kind == "int":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=kind == "loguniform")
