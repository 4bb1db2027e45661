"""Writing a report: report.json for machines, report.md and plots for people, tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mobula import artifacts
from mobula.evaluation import plots
from mobula.experiment import Report

VERDICTS = {"holds": "holds", "does_not_hold": "does not hold", "undecided": "undecided"}

MEASURES = "Measures"
PIPED_WIDTH = 170


def write(report: Report, directory: Path) -> None:
    """Write plots, report.md and, last, report.json: its presence marks the run as finished."""
    names = [plots.draw(data, directory / "plots", name) for name, data in report.plots.items()]
    artifacts.write_text(directory / "report.md", to_markdown(report, names))
    artifacts.write_json(directory / "report.json", _finite(report.to_dict()))


def to_markdown(report: Report, plot_names: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    lines = [f"# {report.experiment} ({report.method})", "", f"Seed {report.seed}, config `{report.config_hash[:12]}`."]
    if report.notes:
        lines += ["", *(f"- {note}" for note in report.notes)]
    for title, rows in _all_tables(report).items():
        lines += ["", f"## {title}", "", *_markdown_table(rows)]
    for name in plot_names:
        lines += ["", f"![{name}](plots/{name}.png)"]
    return "\n".join(lines) + "\n"


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the headline, which claims hold, and the notes; measures where there is no table.

    The rest is in report.md: nobody reads a hundred lines that have scrolled by.
    """
    console = console or _console()
    every = _all_tables(report)
    headline = next(iter(report.tables), MEASURES)
    if headline in every:
        print_table(headline, every[headline], console)
    for verdict, shown in VERDICTS.items():
        names = [claim.name for claim in report.claims if claim.verdict == verdict]
        if names:
            console.print(f"{shown} ({len(names)}): {'; '.join(names)}", markup=False, highlight=False)
    for note in report.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    rest = [title for title in every if title != headline]
    console.print(f"in the report besides: {', '.join(rest)}", markup=False, highlight=False)


def print_table(title: str, rows: Sequence[Sequence[Any]], console: Console | None = None) -> None:
    """Print rows as a table, the first one being its header; columns of numbers are set flush right."""
    console = console or _console()
    header, *body = rows
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for position, name in enumerate(header):
        numbers = all(isinstance(row[position], int | float) for row in body if position < len(row))
        table.add_column(_cell(name), justify="right" if numbers and body else "left", overflow="fold")
    for row in body:
        # Text, not markup: a document id in brackets must not vanish.
        table.add_row(*(_escape(_cell(value)) for value in row))
    console.print(table)


def _console() -> Console:
    """A console; where nobody's window sets the width (a log, a pipe), wide enough for a table of systems."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


def _all_tables(report: Report) -> dict[str, list[list[Any]]]:
    tables: dict[str, list[list[Any]]] = {}
    if report.data:
        rows = [[d.name, d.source, d.records, d.sha256[:12]] for d in report.data]
        tables["Data"] = [["name", "source", "records", "sha256"], *rows]
    tables.update(report.tables)
    if report.claims:
        rows = [
            [c.name, c.statement, c.effect, _interval(c.low, c.high), c.n, VERDICTS[c.verdict]] for c in report.claims
        ]
        tables["Claims"] = [["claim", "statement", "effect", "95 % interval", "n", "verdict"], *rows]
    if report.measures:
        rows = [[name, m.value, _interval(m.low, m.high), m.n] for name, m in report.measures.items()]
        tables[MEASURES] = [["measure", "value", "95 % interval", "n"], *rows]
    if report.cost:
        tables["Cost"] = [["what", "value"], *([name, value] for name, value in report.cost.items())]
    return tables


def _interval(low: float, high: float) -> str:
    return f"[{_cell(low)}, {_cell(high)}]"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _markdown_table(rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[_cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
    header, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [header, "|" + "---|" * len(rows[0]), *body]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # A NumPy number is none of JSON's; its Python value is.
    return value.item() if hasattr(value, "item") else value
