"""The one comparison: arms with several seeds each, trained, evaluated on test examples once, and reported.

A method brings how an arm is trained (``train``), what a trained one does with test examples (``evaluate``) and its
metrics by iteration (``curve``). The study owns what lies around them: stages that wait for one another, several jobs
at a time, results on disk, and everything that a report says of values f[S, Q] by seed and test example.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.cluster.pool import Row, pool
from mobula.config import key, nearest, section
from mobula.errors import MobulaError
from mobula.evaluation import claims, tables
from mobula.evaluation.intervals import mean_interval, paired_difference
from mobula.experiment import Claim, ExperimentConfig, Measure, Report, Run
from mobula.models.memory import Step

CURVES = "curves.jsonl"  # every arm's metrics by seed and iteration


@dataclass
class StudyEvaluation:
    """How test examples are looked at: once, after all training."""

    seeds: int = key(1, "training seeds: seed, seed + 1, ...", ge=1, le=20)
    resamples: int = key(10_000, "bootstrap resamples", ge=100)
    decisive: bool = key(True, "false: too small to decide; every claim is undecided (smoke)")


@dataclass
class StudyConfig(ExperimentConfig):
    """The keys of an experiment that compares arms; a method's config gives ``arms`` its default and help."""

    arms: list[str] = key([], "what is compared; the first arm is the one that the others are compared with")
    parallel: int = key(1, "trainings that run at the same time, each on a Ray actor; 1: one after another", ge=1)
    evaluation: StudyEvaluation = section(StudyEvaluation)

    @property
    def seeds(self) -> Sequence[int]:
        """The training seeds."""
        return range(self.seed, self.seed + self.evaluation.seeds)

    def steps(self) -> Iterator[Step]:
        """Of every training of a pretrained model, the largest; none where networks are small."""
        return iter(())

    def study_problems(
        self, known: Sequence[str], workers: Mapping[str, int | None], renamed: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """What is wrong with the arms, and with trainings that run at the same time but want workers or actors.

        ``workers``: by dotted key, how many processes a part of the method asks for; ``renamed``: arms' old names.
        """
        for name in self.arms:
            if renamed and name in renamed:
                yield f"arms: {name!r} was renamed: use {renamed[name]}"
            elif name not in known:
                yield f"arms: unknown {name!r}{nearest(name, known)}; expected {', '.join(known)}"
        if not self.arms or len(set(self.arms)) < len(self.arms):
            yield "arms is empty or names one twice; the first one is served"
        yield from parallel_problems(self.parallel, workers)


def parallel_problems(parallel: int, workers: Mapping[str, int | None]) -> Iterator[str]:
    """What of a method, by dotted key, asks for processes although trainings run at the same time on actors."""
    for name, count in workers.items():
        if parallel > 1 and count != 0:
            yield f"parallel={parallel} needs {name}=0: trainings have the actors"


@dataclass(frozen=True)
class System:
    """What is evaluated, by value: an arm, and how it is used if not as it was trained: ``(("think", "off"),)``."""

    arm: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, system: str | System, **options: Any) -> System:
        """The system of an arm, or a system with further options."""
        base = cls(system) if isinstance(system, str) else system
        return cls(base.arm, tuple(sorted({**dict(base.options), **options}.items())))

    @property
    def label(self) -> str:
        """For tables and plots: ``exsearch, think off``."""
        return ", ".join([self.arm, *(f"{name.replace('_', ' ')} {value}" for name, value in self.options)])

    def __str__(self) -> str:
        return self.label

    @property
    def slug(self) -> str:
        """For file names."""
        return self.label.replace(", ", "-").replace(" ", "-").replace("/", "-")


Train = Callable[[str, int, Path], object]
Evaluate = Callable[[System, int, Path], Iterable[Row]]


@dataclass
class Study:
    """Arms and seeds in a run's directory. What is finished there is read and not done again.

    ``train(arm, seed, directory)`` leaves its results in the directory of its seed and arm and, called again, finds
    them there. ``evaluate(system, seed, directory)`` gives a row for every test example, in the same order for all:
    ``{query, stratum?, cluster?, metric: number or null}``; rows of one ``cluster`` (one query asked several times) are
    resampled together; ``directory`` is that of the seed. ``curve(arm, seed)`` gives the
    rows of metrics by iteration of ``alternating`` arms. All three are picklable: bound methods of a small dataclass.
    """

    run: Run
    stages: Sequence[Sequence[str]]  # arms of a stage wait for those of the stage before
    systems: Sequence[System]
    train: Train
    evaluate: Evaluate
    curve: Callable[[str, int], list[Row]] = lambda arm, seed: []
    alternating: Sequence[str] = ()

    def execute(self) -> Results:
        """Train every arm of every seed, and only then look at the test examples, once."""
        config, directory = _config(self.run), self.run.directory
        _require_different([system.slug for system in self.systems])
        with pool(config.parallel if config.parallel > 1 else 0, self.run.cluster) as workers:
            for arms in self.stages:
                workers.map(_Training(self.train, directory), arms, config.seeds)
            workers.map(_Evaluation(self.evaluate, directory), self.systems, config.seeds)
        rows = {
            system: [read_jsonl(results_path(directory, system, seed)) for seed in config.seeds]
            for system in self.systems
        }
        curves = {arm: [self.curve(arm, seed) for seed in config.seeds] for arm in self.alternating}
        write_jsonl(
            directory / CURVES,
            (
                {"arm": arm, "seed": seed, **row}
                for arm, runs in curves.items()
                for seed, curve in zip(config.seeds, runs, strict=True)
                for row in curve
            ),
        )
        return Results(config, rows, curves)


def arm_directory(directory: Path, arm: str, seed: int) -> Path:
    """Where an arm of a seed is trained."""
    return seed_directory(directory, seed) / arm


def seed_directory(directory: Path, seed: int) -> Path:
    """Where everything of a seed is."""
    return directory / f"seed-{seed}"


def results_path(directory: Path, system: System, seed: int) -> Path:
    """The rows of a system and seed."""
    return directory / "results" / f"seed-{seed}" / f"{system.slug}.jsonl"


@dataclass(frozen=True)
class Results:
    """Rows by system and seed, one a test example, and rows of metrics by arm, seed and iteration.

    Raises:
        MobulaError: systems or seeds have not the same test examples in the same order: pairs would be of others.
    """

    config: StudyConfig
    rows: Mapping[System, Sequence[Sequence[Row]]]
    curves: Mapping[str, Sequence[Sequence[Row]]]

    def __post_init__(self) -> None:
        first = [_example(row) for row in next(iter(self.rows.values()))[0]]
        for system, runs in self.rows.items():
            for seed, run in zip(self.config.seeds, runs, strict=True):
                if not run or [_example(row) for row in run] != first:
                    raise MobulaError(f"{system.label}, seed {seed}: not evaluated on the test examples of the others")

    @property
    def first(self) -> System:
        """The system that the others are compared with, and that is served."""
        return System(self.config.arms[0])

    def has(self, system: str | System) -> bool:
        """Whether a system was evaluated."""
        return System.of(system) in self.rows

    def runs(self, system: str | System) -> Sequence[Sequence[Row]]:
        """A system's rows by seed.

        Raises:
            MobulaError: if it was not evaluated.
        """
        wanted = System.of(system)
        if wanted not in self.rows:
            known = ", ".join(system.label for system in self.rows)
            raise MobulaError(f"{wanted.label} was not evaluated (there are: {known})")
        return self.rows[wanted]

    def strata(self) -> list[str]:
        """The strata of the test examples, as they first appear."""
        return list(dict.fromkeys(row["stratum"] for row in next(iter(self.rows.values()))[0] if "stratum" in row))

    def values(self, system: str | System, metric: str, stratum: str = "") -> np.ndarray:
        """f[S, Q] by seed and test example that has the metric in every seed.

        ``stratum``: the examples' stratum or, where none is called so, what the strata that are meant begin with.
        """
        return self._values(system, metric, self._applicable(system, metric, stratum))

    def measure(self, system: str | System, metric: str, stratum: str = "") -> Measure | None:
        """The mean of a metric with its interval; None where no test example has it."""
        kept = self._applicable(system, metric, stratum)
        if not kept:
            return None
        values, resamples = self._values(system, metric, kept), self.config.evaluation.resamples
        return mean_interval(values, resamples=resamples, clusters=self._clusters(system, kept))

    def difference(self, a: str | System, b: str | System, metric: str, stratum: str = "") -> Measure | None:
        """The mean of a - b over the test examples for which both have the metric, paired, with its interval."""
        kept = self._shared(a, b, metric, stratum)
        if not kept:
            return None
        one, other = (self._values(system, metric, kept) for system in (a, b))
        resamples = self.config.evaluation.resamples
        return paired_difference(one, other, resamples=resamples, clusters=self._clusters(a, kept))

    def claim(
        self,
        name: str,
        statement: str,
        a: str | System,
        b: str | System,
        metric: str,
        *,
        stratum: str = "",
        margin: float = 0.0,
    ) -> Claim:
        """The claim that a exceeds b in a metric, as :func:`mobula.evaluation.claims.compare`."""
        kept = self._shared(a, b, metric, stratum)
        if not kept:
            raise MobulaError(f"claim {name}: no test example has {metric}{f' in {stratum}' if stratum else ''}")
        one, other = (self._values(system, metric, kept) for system in (a, b))
        return self.compare(name, statement, one, other, margin=margin, clusters=self._clusters(a, kept))

    def compare(
        self,
        name: str,
        statement: str,
        a: np.ndarray,
        b: np.ndarray,
        *,
        margin: float = 0.0,
        clusters: Sequence[Hashable] | None = None,
    ) -> Claim:
        """A claim on values of any kind f[S, Q], as decisive as the run is.

        ``clusters`` of the Q columns; where the examples have clusters and the columns are all examples, theirs.

        Raises:
            MobulaError: the examples have clusters, and those of the columns are not told.
        """
        how = self.config.evaluation
        if clusters is None:
            clusters = self._clusters(self.first, range(len(self.runs(self.first)[0])))
            if clusters is not None and len(clusters) != np.shape(a)[-1]:
                raise MobulaError(f"claim {name}: which clusters its {np.shape(a)[-1]} columns belong to is not said")
        resamples, decisive = how.resamples, how.decisive
        return claims.compare(
            name, statement, a, b, margin=margin, decisive=decisive, resamples=resamples, clusters=clusters
        )

    def report(
        self,
        report: Report,
        metrics: Mapping[str, str],
        curves: Mapping[str, str],
        *,
        scale: float = tables.PERCENT,
        examples: str = "Test examples",
    ) -> None:
        """What every study says, into a report; a method adds its own tables, plots and claims.

        ``metrics``: titles of the rows' metrics, the first being the main one: measures of every system, over all
        examples and by stratum, their table, differences beside the first system, and the main one by stratum.
        ``curves``: labels of the metrics by iteration that are plotted.
        """
        main, systems = next(iter(metrics)), {system.label: system for system in self.rows}
        strata = self.strata() if len(self.strata()) > 1 else []
        for label, system in systems.items():
            for metric in metrics:
                for stratum in ("", *strata):
                    measure = self.measure(system, metric, stratum)
                    if measure is not None:
                        report.measures["/".join(filter(None, [label, metric, stratum]))] = measure
        measures = report.measures
        report.notes.append(f"training seeds: {self.config.evaluation.seeds}; intervals: 95 %, over seeds and examples")
        report.tables[examples] = tables.measures(systems, metrics, lambda a, m: measures.get(f"{a}/{m}"), scale=scale)
        if strata:
            title = f"{metrics[main]} by stratum"
            by_stratum = dict(zip(strata, strata, strict=True))
            report.tables[title] = tables.measures(
                systems, by_stratum, lambda a, s: measures.get(f"{a}/{main}/{s}"), scale=scale
            )
        others = {label: system for label, system in systems.items() if system != self.first}
        report.tables[f"Beside {self.first.label}, difference"] = tables.measures(
            others, metrics, lambda a, m: self.difference(systems[a], self.first, m), scale=scale
        )
        for metric, label in curves.items():
            report.plots[metric] = tables.curves_plot(self.curves, metric, label)

    def _applicable(self, system: str | System, metric: str, stratum: str) -> list[int]:
        """The test examples of a stratum that have a metric in every seed.

        Raises:
            MobulaError: if the system's rows do not know the metric.
        """
        runs = self.runs(system)
        if metric not in runs[0][0]:
            known = ", ".join(runs[0][0])
            raise MobulaError(f"{System.of(system).label} was not measured by {metric} (there are: {known})")
        strata = {name for name in self.strata() if name == stratum} or {
            name for name in self.strata() if name.startswith(stratum)
        }
        return [
            i
            for i, rows in enumerate(zip(*runs, strict=True))
            if (not stratum or rows[0].get("stratum") in strata) and all(row[metric] is not None for row in rows)
        ]

    def _shared(self, a: str | System, b: str | System, metric: str, stratum: str) -> list[int]:
        """The test examples of a stratum for which both systems have a metric."""
        return sorted(set(self._applicable(a, metric, stratum)) & set(self._applicable(b, metric, stratum)))

    def _clusters(self, system: str | System, examples: Sequence[int]) -> list[Hashable] | None:
        rows = self.runs(system)[0]
        return [rows[i]["cluster"] for i in examples] if "cluster" in rows[0] else None

    def _values(self, system: str | System, metric: str, examples: Sequence[int]) -> np.ndarray:
        return np.array([[run[i][metric] for i in examples] for run in self.runs(system)], dtype=float)


def _example(row: Row) -> tuple[Any, ...]:
    return row["query"], row.get("stratum"), row.get("cluster")


def _require_different(slugs: Sequence[str]) -> None:
    """Systems keep their results apart by their slugs."""
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise MobulaError(f"systems share the name {', '.join(twice)} on disk; give them different options")


def _config(run: Run) -> StudyConfig:
    assert isinstance(run.config, StudyConfig)
    return run.config


@dataclass(frozen=True)
class _Training:
    """Trains an arm of a seed in its directory."""

    train: Train
    directory: Path

    @property
    def __name__(self) -> str:
        return "trained"

    def __call__(self, arm: str, seed: int) -> None:
        self.train(arm, seed, arm_directory(self.directory, arm, seed))


@dataclass(frozen=True)
class _Evaluation:
    """Evaluates a system of a seed, unless its rows are there."""

    evaluate: Evaluate
    directory: Path

    @property
    def __name__(self) -> str:
        return "evaluated"

    def __call__(self, system: System, seed: int) -> None:
        path = results_path(self.directory, system, seed)
        if not path.is_file():
            write_jsonl(path, self.evaluate(system, seed, seed_directory(self.directory, seed)))
