"""Plots from plain data, as PNG and SVG.

``{"kind": ..., "x": label, "y": label, "title": text?, ...}`` with, by kind:

- ``line``: ``series`` {name: [(x, y), ...]}, or (x, y, low, high) with intervals
- ``scatter``: ``points`` [(x, y), ...] or ``series``; ``labels`` (one per point) and ``line`` [(x, y), ...] if wanted
- ``pareto``: ``series``, with the front of low x and high y drawn through all of them
- ``bars``: ``bars`` {name: value or [value, low, high]}

``log_x: true`` makes the x axis logarithmic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mobula.errors import MobulaError

Point = Sequence[float]
# Distinct in shape as well as in colour, for readers who cannot tell the colours apart.
MARKERS = "osD^vPX*<>"
# Strong colours first, so that few series stay apart as well as ten do.
COLOURS = [colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
INSIDE, WIDE = 8, 10.0  # series that a legend inside the axes has room for; width in inches with a legend beside them


def draw(data: dict[str, Any], directory: Path, name: str) -> str:
    """Draw ``data`` into ``directory/name.png`` and ``.svg``; the name.

    Raises:
        MobulaError: for an unknown kind.
    """
    if data.get("kind") not in _KINDS:
        raise MobulaError(f"plot {name}: unknown kind {data.get('kind')!r}; expected one of {', '.join(_KINDS)}")
    # No pyplot: it keeps global state and every figure alive.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=data.get("x", ""), ylabel=data.get("y", ""), title=data.get("title", ""))
    axes.grid(alpha=0.3)
    if data.get("log_x"):
        axes.set_xscale("log")
    axes.set_prop_cycle(color=COLOURS)
    _KINDS[data["kind"]](axes, data)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > INSIDE:
        figure.set_figwidth(WIDE)
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    elif labels:
        axes.legend(fontsize="small")
    directory.mkdir(parents=True, exist_ok=True)
    # Neither file carries a date, so the same data gives the same bytes.
    figure.savefig(directory / f"{name}.png", dpi=150)
    figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
    return name


def pareto_front(points: Iterable[Point]) -> list[tuple[float, float]]:
    """The points that no other one beats in low x and high y, by rising x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(((p[0], p[1]) for p in points), key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _line(axes: Axes, data: dict[str, Any]) -> None:
    for position, (name, points) in enumerate(data["series"].items()):
        xs, ys = _columns(points)
        colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
        # Markers begin again after ten series, which are dashed then.
        axes.plot(xs, ys, marker=marker, label=name, color=colour, linestyle="-" if position < len(MARKERS) else "--")
        if points and len(points[0]) == 4:
            below, above = zip(*((p[1] - p[2], p[3] - p[1]) for p in points), strict=True)
            axes.errorbar(xs, ys, [below, above], fmt="none", capsize=3, color=colour)
    if not data.get("log_x") and all(float(p[0]).is_integer() for points in data["series"].values() for p in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no iteration 0.5


def _scatter(axes: Axes, data: dict[str, Any]) -> None:
    series = data.get("series") or {"": data["points"]}
    for position, (name, points) in enumerate(series.items()):
        axes.scatter(*_columns(points), marker=MARKERS[position % len(MARKERS)], label=name or None)
    for label, point in zip(data.get("labels", ()), data.get("points", ()), strict=False):
        axes.annotate(label, (point[0], point[1]), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    if data.get("line"):
        axes.plot(*_columns(data["line"]), color="0.3", linestyle="--", zorder=0)


def _pareto(axes: Axes, data: dict[str, Any]) -> None:
    front = pareto_front(point for points in data["series"].values() for point in points)
    _scatter(axes, {**data, "line": front})


def _bars(axes: Axes, data: dict[str, Any]) -> None:
    for position, value in enumerate(data["bars"].values()):
        middle, low, high = value if isinstance(value, Sequence) else (value, value, value)
        axes.bar(position, middle, color="C0")
        if high > low:
            axes.errorbar(position, middle, [[middle - low], [high - middle]], color="0.2", capsize=3)
    axes.set_xticks(range(len(data["bars"])), list(data["bars"]), rotation=30, ha="right")


def _columns(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    pairs = [(float(p[0]), float(p[1])) for p in points]
    return [x for x, _ in pairs], [y for _, y in pairs]


_KINDS = {"line": _line, "scatter": _scatter, "pareto": _pareto, "bars": _bars}
