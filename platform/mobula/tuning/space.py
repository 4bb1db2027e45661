"""What a sweep varies: the schema of tune_spaces/*.yaml, and the points of a space.

A point maps dotted keys of the experiment to values. Points that the experiment's own schema refuses
(contradicting keys) and points that ``exclude`` names are left out before any trial starts, counted by reason.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobula import config as configs
from mobula import methods
from mobula.config import key, section
from mobula.errors import ConfigError
from mobula.experiment import ExperimentConfig

MODES = ("inference", "inline", "distributed")
SEARCHERS = ("grid", "random", "optuna")
SCHEDULERS = ("none", "asha")
RANGES = ("uniform", "loguniform", "int")
# Draws in a row that may all be refused before the space is called empty.
PATIENCE = 1000

Point = dict[str, Any]


@dataclass
class Asha:
    """When ASHA (Li et al. 2020, Algorithm 2) stops a trial; counted in a quantity that trials report."""

    unit: str = key("step", "reported quantity that counts a trial's progress")
    grace: int = key(1, "progress before a trial may be stopped", ge=1)
    limit: int = key(100, "progress at which every trial ends", ge=1)
    reduction: float = key(3.0, "one trial in this many goes on at each rung", gt=1)

    def problems(self) -> list[str]:
        """Contradictions between the keys."""
        return ["grace must be below limit"] if self.grace >= self.limit else []


@dataclass
class SpaceConfig(ExperimentConfig):
    """A sweep. Relative paths count from the current directory.

    ``mode``: ``inference`` trains once (or takes ``artifact``) and measures every point on that frozen artifact;
    ``inline`` trains each point inside its trial's process; ``distributed`` lets each trial start training
    workers of its own.
    """

    experiment: str = key("", "path of the experiment file whose keys are varied")
    mode: str = key("inference", "what a trial is", choices=MODES)
    artifact: str | None = key(None, "inference: artifact directory to measure; null trains the experiment once")
    fixed: dict[str, Any] = key({}, "experiment keys set alike in every trial")
    parameters: dict[str, Any] = key(
        {}, "experiment key -> {choice: [...]}, {uniform: [lo, hi]}, {loguniform: [lo, hi]} or {int: [lo, hi]}"
    )
    exclude: list[dict[str, Any]] = key(
        [], "rows of key: value (or list of values); a point that matches a whole row is left out"
    )
    objectives: dict[str, str] = key({}, "metric -> max or min, in order; ASHA and plots follow the first")
    within: list[float] = key([], "limits on the second objective; the report names the best trial inside each")
    per: str | None = key(None, "parameter each of whose values gets its own best trial in the report")
    searcher: str = key("grid", "grid: every point; random: seeded draws; optuna: TPE", choices=SEARCHERS)
    scheduler: str = key("none", "whether weak trials stop early", choices=SCHEDULERS)
    asha: Asha = section(Asha)
    trials: int | None = key(None, "trials to run (random and optuna)", ge=1)
    concurrent: int | None = key(None, "trials at a time; null: what cluster.yaml says, without one 1", ge=1)
    cpus: float | None = key(None, "CPUs of a trial; null: what cluster.yaml says, without one 1", gt=0)
    gpus: float | None = key(None, "GPUs of a trial; null: what cluster.yaml says, without one 0", ge=0)

    def problems(self) -> list[str]:
        """Contradictions between the keys, and parameters that are not a space."""
        return [*self._search_problems(), *self._objective_problems(), *self._parameter_problems()]

    def _search_problems(self) -> Iterator[str]:
        if not self.experiment:
            yield "experiment is missing; give the path of an experiment file"
        if self.artifact is not None and self.mode != "inference":
            yield f"artifact is for mode=inference, not mode={self.mode}"
        if self.scheduler == "asha" and self.mode == "inference":
            yield "scheduler=asha needs trials that train (mode=inline or distributed)"
        if self.mode == "distributed" and (self.cpus is not None or self.gpus is not None):
            yield "cpus and gpus of a distributed trial are those of its training workers; leave them out here"
        if self.searcher == "grid" and self.trials is not None:
            yield "searcher=grid runs every point; leave trials out, or use searcher=random"
        if self.searcher != "grid" and self.trials is None:
            yield f"searcher={self.searcher} needs trials"

    def _objective_problems(self) -> Iterator[str]:
        if not self.objectives:
            yield "objectives is empty; give at least one metric: max or metric: min"
        for metric, mode in self.objectives.items():
            if mode not in ("max", "min"):
                yield f"objectives.{metric}={mode!r}: expected max or min"
        if self.within and list(self.objectives.values())[1:2] != ["min"]:
            yield "within limits the second objective, which must be one with mode=min"

    def _parameter_problems(self) -> Iterator[str]:
        if not self.parameters:
            yield "parameters is empty; nothing to vary"
        for name, domain in self.parameters.items():
            yield from _domain_problems(name, domain)
            if self.searcher == "grid" and isinstance(domain, dict) and "choice" not in domain:
                yield f"parameters.{name}: searcher=grid needs {{choice: [...]}}"
            if name in self.fixed:
                yield f"{name} is both in fixed and in parameters"
        used = [(f"exclude[{i}]", name) for i, row in enumerate(self.exclude) for name in row]
        used += [("per", self.per)] if self.per else []
        for where, name in used:
            if name not in self.parameters:
                yield f"{where}: {name} is no parameter of this space{configs.nearest(name, list(self.parameters))}"


def _domain_problems(name: str, domain: Any) -> Iterator[str]:
    where = f"parameters.{name}"
    kinds = ("choice", *RANGES)
    if not isinstance(domain, dict) or len(domain) != 1 or next(iter(domain)) not in kinds:
        yield f"{where}: {domain!r} is no domain; expected one of {', '.join(kinds)} with its values"
        return
    kind, values = next(iter(domain.items()))
    if kind == "choice":
        if not isinstance(values, list) or not values:
            yield f"{where}: choice needs a list of values"
        return
    numbers = isinstance(values, list) and len(values) == 2 and all(_is_number(v) for v in values)
    if not numbers or not values[0] < values[1]:
        yield f"{where}: {kind} needs [low, high] with low < high, found {values!r}"
    elif kind == "loguniform" and values[0] <= 0:
        yield f"{where}: loguniform needs low > 0, found {values[0]}"
    elif kind == "int" and not all(isinstance(v, int) for v in values):
        yield f"{where}: int needs whole numbers, found {values!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class Space:
    """A checked space: the sweep's config, the experiment it varies, and the points that were refused so far."""

    config: SpaceConfig
    schema: type[ExperimentConfig]
    base: dict[str, Any]
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def grid_size(self) -> int:
        """Points of the full grid, refused ones included."""
        return math.prod(len(domain["choice"]) for domain in self.config.parameters.values())

    def experiment(self, point: Point) -> ExperimentConfig:
        """The experiment at a point.

        Raises:
            ConfigError: if the schema refuses the point.
        """
        return configs.build(self.schema, with_keys(self.base, point), source="point")

    def allows(self, point: Point) -> bool:
        """Whether a point may run; a refusal is counted under its reason."""
        row = next((row for row in self.config.exclude if _matches(point, row)), None)
        if row is not None:
            self.refused[f"exclude: {row}"] += 1
            return False
        problems = configs.contradictions(self._changed(point))
        if problems:
            self.refused["; ".join(problems)] += 1
        return not problems

    def points(self) -> list[Point]:
        """The points of a grid or random search, in order, without repetition.

        Raises:
            ConfigError: if none is allowed.
        """
        wanted = self.grid_size if self.config.searcher == "grid" else self.config.trials
        candidates = self._grid() if self.config.searcher == "grid" else self._draws()
        points: dict[str, Point] = {}
        fruitless = 0
        for point in candidates:
            name = configs.digest(point)
            fresh = name not in points and self.allows(point)
            fruitless = 0 if fresh else fruitless + 1
            if fresh:
                points[name] = point
            if len(points) == wanted or (self.config.searcher == "random" and fruitless == PATIENCE):
                break
        if not points:
            raise self.empty()
        return list(points.values())

    def empty(self) -> ConfigError:
        """The error of a space without an allowed point."""
        reasons = [f"{reason} ({n} points)" for reason, n in self.refused.most_common(3)]
        return ConfigError(["no point of the space is allowed", *reasons], self.config.name)

    def _changed(self, point: Point) -> ExperimentConfig:
        """The experiment at a point, its keys set without being checked again: :func:`load` has tried every value,
        and building a config from scratch takes some 50 ms."""
        changed = copy.deepcopy(self._plain)
        for name, value in point.items():
            *sections, leaf = name.split(".")
            setattr(functools.reduce(getattr, sections, changed), leaf, value)
        return changed

    @functools.cached_property
    def _plain(self) -> ExperimentConfig:
        """The experiment that is varied, its contradictions (which a point may resolve) not yet looked at."""
        return configs.unchecked(self.schema, self.base)

    def _grid(self) -> Iterator[Point]:
        names = list(self.config.parameters)
        values = [domain["choice"] for domain in self.config.parameters.values()]
        return (dict(zip(names, combination, strict=True)) for combination in itertools.product(*values))

    def _draws(self) -> Iterator[Point]:
        generator = np.random.default_rng(self.config.seed)
        while True:
            yield {name: _draw(domain, generator) for name, domain in self.config.parameters.items()}


def load(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Space:
    """Load a space file and the experiment it names, and check every key and value of it.

    Raises:
        ConfigError: with everything that is wrong; a key the experiment lacks comes with the nearest it has.
    """
    config = configs.load(SpaceConfig, path, overrides)
    experiment = methods.load_config(Path(config.experiment))
    if config.method not in ("", experiment.method):
        problem = f"method={config.method!r}, but {config.experiment} is one of {experiment.method}"
        raise ConfigError([problem], str(path))
    config.method = experiment.method
    schema = type(experiment)
    problems = configs.check_values(schema, itertools.chain(config.fixed.items(), _samples(config)))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(path))
    base = with_keys(configs.to_dict(experiment), config.fixed)
    problems = list(_worker_problems(config, base))
    if problems:
        raise ConfigError(problems, str(path))
    return Space(config, schema, base)


def with_keys(values: dict[str, Any], point: Point) -> dict[str, Any]:
    """A copy of nested ``values`` with dotted keys set."""
    result = dict(values)
    for name, value in point.items():
        head, _, rest = name.partition(".")
        result[head] = with_keys(result[head], {rest: value}) if rest else value
    return result


def _worker_problems(config: SpaceConfig, base: dict[str, Any]) -> Iterator[str]:
    """A trial trains in its own process or starts workers; the experiment's training section must say the same."""
    workers = base.get("training", {}).get("workers")
    if workers is None:
        return
    if config.mode == "inline" and workers > 0:
        yield f"mode=inline trains in the trial's process, but training.workers={workers}; set it to 0 in fixed"
    if config.mode == "distributed" and workers == 0:
        yield "mode=distributed needs training.workers of at least 1; set it in fixed, or use mode=inline"


def _samples(config: SpaceConfig) -> Iterator[tuple[str, Any]]:
    """Every choice and both ends of every range: what the experiment's schema must accept."""
    for name, domain in config.parameters.items():
        yield from ((name, value) for value in next(iter(domain.values())))


def _matches(point: Point, row: dict[str, Any]) -> bool:
    return all(
        point[name] == value or (isinstance(value, list) and point[name] in value) for name, value in row.items()
    )


def _draw(domain: dict[str, Any], generator: np.random.Generator) -> Any:
    kind, values = next(iter(domain.items()))
    if kind == "choice":
        return values[int(generator.integers(len(values)))]
    low, high = values
    if kind == "int":
        return int(generator.integers(low, high, endpoint=True))
    if kind == "uniform":
        return float(generator.uniform(low, high))
    return float(math.exp(generator.uniform(math.log(low), math.log(high))))
