"""The report of a `dynamic_retrieval` run: measures, tables and plots; claims come from :mod:`.claims`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mobula.evaluation.ranking import MEASURES, width_note
from mobula.evaluation.tables import PERCENT, Table, cell
from mobula.experiment import Measure, Report
from mobula.retrieval.dynamic.claims import claims
from mobula.retrieval.dynamic.config import SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import INITIAL_SHARE, ORACLE
from mobula.retrieval.dynamic.measures import STATISTICS, generalisation, initial
from mobula.retrieval.dynamic.results import Results

Row = dict[str, Any]  # cells by heading


def build_report(report: Report, results: Results, rates: list[list[Any]]) -> None:
    """Write everything into the report."""
    report.measures.update(_measures(results))
    for title, row in TABLES.items():
        rows = {system.label: row(results, system) for system in results.systems}
        shown = {label: cells for label, cells in rows.items() if cells}
        if shown:
            header = ["system", *next(iter(shown.values()))]
            body = [[label, *cells.values()] for label, cells in shown.items()]
            report.tables[title.format(results.primary)] = [header, *body]
    report.tables["Sessions"] = _sessions(results)
    report.tables["Learning rates"] = [["system", "rate", "dev value of its trial", "chosen"], *rates]
    report.claims.extend(claims(results))
    report.notes.extend(_width_notes(results))
    report.plots.update(_plots(results))


def _width_notes(results: Results) -> Iterator[str]:
    """Where a beam ranks fewer documents than one pass of a diffusion model does."""
    learners = {system.paradigm: system for system in reversed([*results.systems])}
    if {"autoregressive", "diffusion"} <= learners.keys():
        names = (learners["diffusion"].label, learners["autoregressive"].label)
        widths = (results.protocol.sizes()[-1], results.config.evaluation.beam)
        if note := width_note(names, widths):
            yield note


def _measures(results: Results) -> dict[str, Measure]:
    """Every statistic of every measure, and every P[t, i] of the primary one."""
    measures: dict[str, Measure] = {}
    for system, of_system in results.systems.items():
        for measure in (m for m in MEASURES if m in of_system.values):
            for name, statistic in STATISTICS.items():
                measures[f"{system}/{name}/{measure}"] = results.measure(system, statistic, measure)
        table = results.table(system, results.primary)
        for i, rows in enumerate(results.protocol.rows):
            for t in range(i, len(results.protocol.rows)):
                value = results.resampler.estimate(np.asarray, table[..., t, i], n=len(rows))
                measures[f"{system}/P[{t},{i}]/{results.primary}"] = value.measure()
    return measures


def _sessions(results: Results) -> Table:
    protocol = results.protocol
    rows = [
        [t, len(protocol.sessions.documents(t)), size, len(rows), round(10 / size, 5)]
        for t, (size, rows) in enumerate(zip(protocol.sizes(), protocol.rows, strict=True))
    ]
    return [["session", "documents", "cumulative", "test rows", "chance Hit@10"], *rows]


def _quality(results: Results, system: SessionSystem) -> Row:
    of_system = results.systems[system]
    means = {m: generalisation(results.p(system, m)) for m in ("Hit@1", "MRR@10") if m in of_system.values}
    return {
        **{f"{name} {results.primary}": cell(results.measure(system, s)) for name, s in STATISTICS.items()},
        **{f"GA {m}": _percent(float(means[m])) if m in means else None for m in ("Hit@1", "MRR@10")},
        "filled %": _percent(of_system.filled),
    }


def _by_state(values: np.ndarray) -> Row:
    return {f"t={t}": _percent(value) for t, value in enumerate(values)}


def _bias(results: Results, system: SessionSystem) -> Row:
    """Share of initial documents in the top ten of new documents' queries, beside their share of the corpus."""
    sizes, facts = results.protocol.sizes(), results.systems[system].diagonal
    share, alone = (np.mean([rows.mean() for rows in facts[name][1:]]) for name in (INITIAL_SHARE, ORACLE))
    ga = float(generalisation(results.p(system, "Hit@10")))
    return {
        "initial documents in top 10 %": _percent(share),
        "minus their share of the corpus": _percent(share - np.mean([sizes[0] / size for size in sizes[1:]])),
        "GA Hit@10": _percent(ga),
        "among the session alone": _percent(alone),
        "gain": _percent(alone - ga),
    }


def _drop(results: Results, system: SessionSystem) -> Row:
    """The drop from P[0,0] to GA of a model on quantised codes, in the quantiser's part and the model's own."""

    def drop(p: np.ndarray) -> np.ndarray:
        return initial(p) - generalisation(p)

    code_only = SessionSystem(f"adc/{system.family}")
    if system not in results.numeric or code_only not in results.systems:
        return {}
    return {
        f"drop of {results.primary}": cell(results.measure(system, drop)),
        "quantiser part": cell(results.measure(code_only, drop)),
        "model part": cell(results.difference(system, code_only, drop).measure()),
    }


def _docids(results: Results, system: SessionSystem) -> Row:
    of_system = results.systems[system]
    headings = {
        "docids": "documents",
        "distinct": "distinct_codes",
        "share that collide": "collision_rate",
        "largest bucket": "largest_bucket",
        "later docids with a code new to the model": "new_codes",
    }
    cells = {heading: of_system.docids[name] for heading, name in headings.items() if of_system.docids}
    return {**cells, "documents never inserted": of_system.unreachable} if cells else {}


def _cost(results: Results, system: SessionSystem) -> Row:
    of_system, documents = results.systems[system], results.protocol.sizes()[-1]
    p50, p95 = np.percentile(of_system.ms, [50, 95])
    inserted, ms = map(sum, zip(*of_system.inserted, strict=True))
    return {
        "p50 ms": round(float(p50), 2),
        "p95 ms": round(float(p95), 2),
        "s per 1,000 added documents": round(ms / inserted, 3),  # as many as ms a document
        "index bytes": of_system.bytes,
        "bytes a document": None if of_system.bytes is None else round(of_system.bytes / documents, 1),
    }


# By title ({}: the primary measure), the cells of a system's row; a system without any is left out.
TABLES: dict[str, Callable[[Results, SessionSystem], Row]] = {
    "Systems": _quality,
    "{} of the documents that have just arrived, P[t, t] %": lambda results, system: _by_state(
        np.diagonal(results.p(system))
    ),
    "{} of the initial documents, P[t, 0] %": lambda all, one: _by_state(all.p(one)[:, 0]),
    "Bias towards the initial documents": _bias,
    "Where the drop comes from": _drop,
    "Docids at the last session": _docids,
    "Latency, size and insertion": _cost,
}


def _percent(value: float) -> float:
    return round(PERCENT * float(value), 1)


def _plots(results: Results) -> dict[str, dict[str, Any]]:
    primary, p = results.primary, {system: results.p(system) for system in results.systems}
    new = {system.label: list(enumerate(np.diagonal(table).tolist())) for system, table in p.items()}
    old = {system.label: list(enumerate(table[:, 0].tolist())) for system, table in p.items()}
    cost = {s.label: [(float(np.median(results.systems[s].ms)), float(generalisation(p[s])))] for s in p}
    return {
        "new_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, t]", "series": new},
        "initial_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, 0]", "series": old},
        "pareto": {"kind": "pareto", "x": "ms per query", "y": f"GA of {primary}", "series": cost, "log_x": True},
    }
