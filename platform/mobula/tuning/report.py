"""What a sweep found: sweep.json with every trial, and the tables and the plot of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mobula import artifacts
from mobula.errors import SweepFailed
from mobula.evaluation import report as rendering
from mobula.experiment import Run
from mobula.tuning import pareto
from mobula.tuning.space import Point, Space


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``completed``, ``stopped`` early by the scheduler, or ``failed``.

    ``metrics`` are those of its last report, ``seconds`` what it took without the start of its process,
    ``folder`` where it wrote, relative to the sweep, ``history`` all reports of a trial that trained.
    """

    point: Point
    status: str
    metrics: dict[str, Any]
    seconds: float
    folder: str
    error: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def write(run: Run, space: Space, outcomes: list[Outcome]) -> list[int]:
    """Write sweep.json, report.json, report.md and the plot; the indices of the Pareto front, best first.

    Only completed trials can be on the front: a stopped one was measured at another progress.

    Raises:
        SweepFailed: if no trial completed.
    """
    completed = [i for i, outcome in enumerate(outcomes) if outcome.status == "completed"]
    if not completed:
        raise SweepFailed(f"{run.directory}: no trial completed; the first one: {_first_error(outcomes)}")
    table = Table(space, outcomes, completed)
    left_out = dict(space.refused.most_common())
    artifacts.write_json(
        run.directory / "sweep.json",
        {
            "experiment": space.config.experiment,
            "objectives": space.config.objectives,
            "trials": [asdict(outcome) for outcome in outcomes],
            "front": table.front,
            "hypervolume": table.hypervolume(),
            "left_out": left_out,
        },
    )
    report = run.report()
    report.cost = _cost(space, outcomes, run.seconds)
    report.tables = table.tables()
    report.notes = table.notes(left_out)
    report.plots = table.plots()
    rendering.write(report, run.directory)
    return table.front


class Table:
    """A sweep's trials as rows: parameters, objectives, status."""

    def __init__(self, space: Space, outcomes: list[Outcome], completed: list[int]) -> None:
        self.config = space.config
        self.outcomes = outcomes
        self.completed = completed
        self.metrics = list(self.config.objectives)
        self.modes = list(self.config.objectives.values())
        self.values = [[float(outcomes[i].metrics[name]) for name in self.metrics] for i in completed]
        front = [completed[i] for i in pareto.pareto_front(self.values, self.modes)]
        self.front = self._ranked(front)

    def hypervolume(self) -> dict[str, Any]:
        """The front's hypervolume against the worst value of each objective among the completed trials."""
        columns = zip(zip(*self.values, strict=True), self.modes, strict=True)
        worst = [min(column) if mode == "max" else max(column) for column, mode in columns]
        return {"value": pareto.hypervolume(self.values, worst, self.modes), "reference": worst}

    def tables(self) -> dict[str, list[list[Any]]]:
        """Title -> rows, the first row being the header."""
        tables = {"Pareto front": self._rows(self.front)}
        if self.config.within:
            tables[f"Best {self.metrics[0]} within a limit on {self.metrics[1]}"] = self._within()
        if self.config.per:
            tables[f"Best trial per {self.config.per}"] = self._rows(self._best_per_group())
        tables["Trials"] = self._rows(range(len(self.outcomes)))
        if self.config.scheduler == "asha":
            tables[f"{self.metrics[0]} by {self.config.asha.unit}"] = self._progress(self.config.asha.unit)
        return tables

    def notes(self, left_out: dict[str, int]) -> list[str]:
        """What a reader must know to read the tables."""
        volume = self.hypervolume()
        notes = [
            "Every value is measured on the dev split: confirm a choice on the test split once.",
            f"Hypervolume of the front {volume['value']:.4g}, against {volume['reference']}.",
        ]
        notes += [f"{n} points left out: {reason}" for reason, n in left_out.items()]
        notes += [f"Trial {i} failed: {o.error}" for i, o in enumerate(self.outcomes) if o.status == "failed"]
        return notes

    def plots(self) -> dict[str, dict[str, Any]]:
        """Quality (the first objective) against the second, with the front as a line."""
        if len(self.metrics) < 2:
            return {}
        quality, cost = self.metrics[:2]
        series: dict[str, list[tuple[float, float]]] = {}
        for index, row in zip(self.completed, self.values, strict=True):
            series.setdefault(self._group(index), []).append((row[1], row[0]))
        front = pareto.pareto_front([row[:2] for row in self.values], self.modes[:2])
        line = sorted((self.values[i][1], self.values[i][0]) for i in front)
        return {"pareto": {"kind": "scatter", "x": cost, "y": quality, "series": series, "line": line}}

    def _group(self, index: int) -> str:
        return str(self.outcomes[index].point[self.config.per]) if self.config.per else ""

    def _rows(self, indices: Sequence[int]) -> list[list[Any]]:
        header = ["trial", *self.config.parameters, *self.metrics, "s", "status"]
        return [header, *(self._row(i) for i in indices)]

    def _row(self, index: int) -> list[Any]:
        outcome = self.outcomes[index]
        point = [outcome.point[name] for name in self.config.parameters]
        values = [outcome.metrics.get(name) for name in self.metrics]
        return [index, *point, *values, round(outcome.seconds, 2), outcome.status]

    def _progress(self, unit: str) -> list[list[Any]]:
        """The first objective of every trial at each report."""
        values = [{row[unit]: row[self.metrics[0]] for row in outcome.history} for outcome in self.outcomes]
        units = sorted({at for row in values for at in row})
        return [["trial", *units], *([i, *(row.get(at, "") for at in units)] for i, row in enumerate(values))]

    def _within(self) -> list[list[Any]]:
        [header] = self._rows([])
        rows = []
        for limit in self.config.within:
            best = pareto.best_within(self.values, 0, 1, limit, mode=self.modes[0])
            nothing = ["none", *[""] * (len(header) - 1)]
            rows.append([limit, *(nothing if best is None else self._row(self.completed[best]))])
        return [["at most", *header], *rows]

    def _best_per_group(self) -> list[int]:
        best: dict[str, int] = {}
        for index in self._ranked(self.completed):
            best.setdefault(self._group(index), index)
        return list(best.values())

    def _ranked(self, indices: Sequence[int]) -> list[int]:
        sign = -1.0 if self.modes[0] == "max" else 1.0
        return sorted(indices, key=lambda i: sign * self.outcomes[i].metrics[self.metrics[0]])


def _cost(space: Space, outcomes: list[Outcome], wall_s: float) -> dict[str, float]:
    cost = {"trials": float(len(outcomes))}
    for status in ("completed", "stopped", "failed"):
        cost[status] = float(sum(outcome.status == status for outcome in outcomes))
    cost["left_out"] = float(sum(space.refused.values()))
    cost["trial_s"] = sum(outcome.seconds for outcome in outcomes)
    cost["wall_s"] = wall_s
    if space.config.scheduler == "asha":
        unit = space.config.asha.unit
        cost[unit] = float(sum(outcome.metrics.get(unit, 0) for outcome in outcomes))
    return cost


def _first_error(outcomes: list[Outcome]) -> str:
    return next((outcome.error for outcome in outcomes if outcome.error), "stopped early")
