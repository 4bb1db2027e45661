"""Tables and plots of a study's results: rows of cells, the first row being the header."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mobula.experiment import Measure

Table = list[list[Any]]
Runs = Sequence[Sequence[Mapping[str, Any]]]  # rows of metrics by seed and iteration
PERCENT = 100.0


def cell(measure: Measure | None, scale: float = PERCENT, digits: int = 1) -> str:
    """``66.8 [62.3, 71.4]``; empty where there is no measure."""
    if measure is None:
        return ""
    value, low, high = (f"{scale * number:.{digits}f}" for number in (measure.value, measure.low, measure.high))
    return f"{value} [{low}, {high}]"


def measures(
    names: Iterable[str],
    columns: Mapping[str, str],
    measure: Callable[[str, str], Measure | None],
    *,
    scale: float = PERCENT,
    head: str = "arm",
) -> Table:
    """A row a name and a column a metric ({metric: title}), each cell ``measure(name, metric)`` with its interval."""
    body = [[name, *(cell(measure(name, metric), scale) for metric in columns)] for name in names]
    return [[head, *columns.values()], *body]


def means(runs: Mapping[str, Runs], columns: Sequence[str], *, scale: float = 1.0, digits: int = 3) -> Table:
    """A row a name: the mean of each column over all rows that have it."""
    table: Table = [["arm", *(title(column) for column in columns)]]
    for name, seeds in runs.items():
        rows = [row for seed in seeds for row in seed]
        table.append([name, *(_mean([row.get(column) for row in rows], scale, digits) for column in columns)])
    return table


def iterations(curves: Mapping[str, Runs], columns: Sequence[str], *, digits: int = 3) -> Table:
    """A row an arm and iteration: the mean over seeds of each column, empty where no seed has it.

    Iterations in which no seed has any of the columns are left out; seeds may have ended early.
    """
    table: Table = [["arm", "iteration", *(title(column) for column in columns)]]
    for name, runs in curves.items():
        for iteration in range(max(map(len, runs))):
            at = [run[iteration] for run in runs if iteration < len(run)]
            cells = [_mean([row.get(column) for row in at], 1.0, digits) for column in columns]
            if any(value != "" for value in cells):
                table.append([name, iteration, *cells])
    return table


def curve(runs: Runs, metric: str) -> list[tuple[float, ...]]:
    """(iteration, mean, least, greatest) over seeds, of the iterations in which every seed has the metric."""
    points: list[tuple[float, ...]] = []
    for iteration in range(min(map(len, runs))):
        at = [run[iteration] for run in runs]
        values = [row[metric] for row in at if row.get(metric) is not None]
        if len(values) == len(runs):
            points.append((float(iteration), float(np.mean(values)), min(values), max(values)))
    return points


def curves_plot(curves: Mapping[str, Runs], metric: str, label: str) -> dict[str, Any]:
    """A line an arm over iterations; arms of which no row has the metric are left out."""
    series = {name: points for name, runs in curves.items() if (points := curve(runs, metric))}
    seeds = max((len(runs) for runs in curves.values()), default=0)
    title = f"mean and range of {seeds} seeds"
    return {"kind": "line", "x": "iteration", "y": label, "title": title, "series": series}


def bars_plot(
    bars: Mapping[str, Measure | None], label: str, *, scale: float = PERCENT, title: str = ""
) -> dict[str, Any]:
    """A bar a name with its interval."""
    intervals = {name: [scale * v for v in (m.value, m.low, m.high)] for name, m in bars.items() if m is not None}
    return {"kind": "bars", "x": "", "y": label, "title": title, "bars": intervals}


def title(column: str) -> str:
    """How a metric is called at the head of a column."""
    return column.removeprefix("dev_").replace("_", " ")


def _mean(values: Sequence[Any], scale: float, digits: int) -> Any:
    numbers = [value for value in values if value is not None]
    return round(scale * float(np.mean(numbers)), digits) if numbers else ""
