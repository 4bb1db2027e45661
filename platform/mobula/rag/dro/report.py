"""The report of a `dro` run: exact match, likelihood by iteration, weights, variance, and the claims of the spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mobula.alternation import Row
from mobula.evaluation.claims import always, compare
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Claim, Measure, Report
from mobula.rag.dro.config import ARMS, COLD, Config
from mobula.rag.dro.pair import KINDS
from mobula.rag.dro.source import Measured, Wording
from mobula.rag.dro.variance import GRADIENT, LIKELIHOOD, Variances

LEAK = 0.1  # share of questions by which the passages shown first may hold answers more often than others
# Title of the table of what varies with the samples, and how a claim calls it.
VARIED = {
    LIKELIHOOD: ("Variance of the likelihood's estimate by samples", "the estimate of the likelihood"),
    GRADIENT: ("Variance of the selector's gradient by samples (trace)", "the selector's gradient"),
}
FALL = 0.02  # nats by which the likelihood of training questions may fall in an iteration


@dataclass(frozen=True)
class Findings:
    """Rows of metrics and test results by arm and seed; the cold start and views have test results alone."""

    config: Config
    wording: Wording
    rows: Mapping[str, Sequence[Sequence[Row]]]
    tested: Mapping[str, Sequence[Measured]]
    distances: Sequence[Sequence[float]]
    variances: Sequence[Variances]

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return self.config.arms[0]

    def values(self, name: str, what: str) -> np.ndarray:
        """f[S, Q] by seed and test question, of those that the measure applies to."""
        found = np.array([found[what] for found in self.tested[name]])
        return found[:, np.isfinite(found).all(0)]


def fill(report: Report, found: Findings) -> None:
    """Measures, tables, plots and claims."""
    evaluation = found.config.evaluation
    wording = found.wording
    report.notes.append(wording.header)
    report.notes.append(f"test questions: {found.config.data.test}; training seeds: {evaluation.seeds}")
    report.notes.extend(_warnings(found))
    for name in found.tested:
        for what in wording.measures:
            values = found.values(name, what)
            if values.size:
                report.measures[f"{name}/{what}"] = mean_interval(values, resamples=evaluation.resamples)
    report.tables["Test questions"] = _tests(report.measures, wording, list(found.tested))
    report.tables["Iterations, mean of seeds"] = _iterations(found)
    if found.distances:
        report.tables["Weighted samples and the exact posterior"] = _distances(found)
    for what, (title, _) in VARIED.items():
        if found.variances:
            report.tables[title] = _variances(found, what)
    sized = [name for name in found.rows if name.startswith(("m_", "raw_m_"))]
    others = [name for name in found.rows if name not in sized]
    for what, label in wording.plotted.items():
        report.plots[what] = _plot(found, others, what, label)
    if sized:
        first = next(iter(wording.plotted))
        report.plots["samples"] = _plot(found, [found.first, *sized], first, wording.plotted[first])
    report.claims.extend(_claims(found))


def _warnings(found: Findings) -> Iterator[str]:
    for name in found.rows:
        em = found.config.of(ARMS[name])
        if em.samples == 1 and em.weights.rule == "snis":
            yield f"{name}: no signal, one sample has weight 1 whatever its likelihood"
    yield from _overfitted(found)
    if "shown_first" in found.tested:
        first, chance = found.values("shown_first", "hit@1").mean(), found.values("shown_first", "chance").mean()
        if first - chance > LEAK:
            yield (
                f"where passages are shown gives the answer away: the first of them holds it in {first:.0%} of the "
                f"questions, one at random in {chance:.0%}; use retrieve.order=shuffled"
            )


def _overfitted(found: Findings) -> Iterator[str]:
    """Arms whose likelihood rises on training questions, while that of dev questions falls below where it began.

    Samples of training questions are those of the networks before the row's M-step, all else of those behind it.
    """
    for name, runs in found.rows.items():
        for train, dev, later in (("train_log_p", "dev_log_p", 0), ("bound", "dev_bound", 1)):
            both = [[(a, b) for a, b in zip(run[later:], run, strict=False) if train in a and dev in b] for run in runs]
            pairs = [[(a[train], b[dev]) for a, b in run] for run in both]
            if all(len(run) > 1 for run in pairs):
                learned, held_out = np.mean([np.subtract(run[-1], run[0]) for run in pairs], 0).tolist()
                if learned > 0 > held_out:
                    yield f"{name}: over-fitted, {train} rose by {learned:.3f} nats and {dev} fell by {-held_out:.3f}"


def _tests(measures: Mapping[str, Measure], wording: Wording, names: Sequence[str]) -> list[list[Any]]:
    def cell(measure: Measure | None, scale: float) -> str:
        if measure is None:
            return ""
        return f"{scale * measure.value:.2f} [{scale * measure.low:.2f}, {scale * measure.high:.2f}]"

    columns = wording.measures.items()
    table: list[list[Any]] = [["arm", *(title for _, (title, _) in columns)]]
    return table + [[name, *(cell(measures.get(f"{name}/{what}"), s) for what, (_, s) in columns)] for name in names]


def _iterations(found: Findings) -> list[list[Any]]:
    table: list[list[Any]] = [["arm", "iteration", *found.wording.shown]]
    for name, runs in found.rows.items():
        for iteration in range(max(map(len, runs))):
            at = [run[iteration] for run in runs if iteration < len(run)]
            values = [[row[column] for row in at if column in row] for column in found.wording.shown]
            table.append([name, iteration, *(round(float(np.mean(v)), 4) if v else "" for v in values)])
    return table


def _distances(found: Findings) -> list[list[Any]]:
    table: list[list[Any]] = [["iteration", "total variation, mean of seeds"]]
    for iteration, values in enumerate(zip(*found.distances, strict=False), 1):
        table.append([iteration, round(float(np.mean(values)), 4)])
    return table


def _variances(found: Findings, what: str) -> list[list[Any]]:
    table: list[list[Any]] = [["samples", *(f"iteration {i}" for i in range(len(found.variances)))]]
    return table + [[m, *(f"{one[what][m].mean():.2e}" for one in found.variances)] for m in found.variances[0][what]]


def _plot(found: Findings, names: Sequence[str], what: str, label: str) -> dict[str, Any]:
    series = {}
    for name in dict.fromkeys(names):
        runs = found.rows[name]
        if not all(what in row for run in runs for row in run):
            continue  # an arm without a selector has no likelihood over orders
        length = min(map(len, runs))
        means = [float(np.mean([run[i][what] for run in runs])) for i in range(length)]
        series[name] = list(enumerate(means))
    title = f"mean of {len(found.tested[COLD])} seeds"
    return {"kind": "line", "x": "iteration", "y": label, "title": title, "series": series}


def _claims(found: Findings) -> Iterator[Claim]:
    yield from _monotone(found)
    yield from _gaps(found)
    yield from _fewer_samples_vary_more(found)
    first, arms = found.first, found.config.arms
    pairs = [(first, COLD, "joint EM beats the cold start")]
    pairs += [(first, half, f"joint EM beats {half}") for half in ("generator_only", "selector_only") if half in arms]
    if "generator_only" in arms:
        pairs.append(("generator_only", COLD, "the generator alone beats the cold start"))
    pairs += [(first, rule, f"weights by likelihood beat {rule}") for rule in ("uniform", "best") if rule in arms]
    for prefix in ("m_", "raw_m_"):
        sizes = [name for name in (f"{prefix}{m}" for m in (1, 2, 4, 14)) if name in arms]
        pairs += [(more, fewer, f"{more} beats {fewer}") for fewer, more in pairwise(sizes)]
    views = [("retriever_order", "the selector beats the retriever's order"), ("rag_sft", "joint EM beats vanilla RAG")]
    pairs += [(first, name, statement) for name, statement in views if name in found.tested]
    pairs += [
        (first, name, f"joint EM beats {name}") for name in ("reward", "reinforce", "distillation") if name in arms
    ]
    if "supervised" in arms and "retriever_order" in found.tested:
        pairs.append(("supervised", "retriever_order", "a selector with labels beats the retriever's order"))
    compared, evaluation = found.wording.compared, found.config.evaluation
    for what in compared:
        for one, other, statement in pairs:
            name = f"{one} - {other}" if len(compared) == 1 else f"{one} - {other}, {what}"
            a, b = found.values(one, what), found.values(other, what)
            yield compare(name, statement, a, b, decisive=evaluation.decisive, resamples=evaluation.resamples)


def _monotone(found: Findings) -> Iterator[Claim]:
    """The exact likelihood of training questions never falls by more than it may, in any seed and iteration."""
    changes = [
        after["train_log_p"] - before["train_log_p"]
        for run in found.rows[found.first]
        for before, after in pairwise(run)
        if "train_log_p" in after
    ]
    if changes:
        statement = f"log p(y|x) of training questions never falls by {FALL} nats (smallest and largest change)"
        yield always("monotone", statement, changes, least=-FALL, decisive=found.config.evaluation.decisive)


def _gaps(found: Findings) -> Iterator[Claim]:
    """Every training of the first arm has raised the objective that it was given."""
    for kind in KINDS:
        gaps = [row[f"gap_{kind}"] for run in found.rows[found.first] for row in run if f"gap_{kind}" in row]
        if gaps:
            statement = f"every M-step raises the {kind}'s own objective (nats a question; smallest and largest)"
            yield always(f"gaps, {kind}", statement, gaps, decisive=found.config.evaluation.decisive)


def _fewer_samples_vary_more(found: Findings) -> Iterator[Claim]:
    """Mean over iterations, paired by question."""
    if not found.variances:
        return
    evaluation, sizes = found.config.evaluation, list(found.variances[0][LIKELIHOOD])
    few, many = min(sizes), max(sizes)
    for what, (_, called) in VARIED.items():
        one, other = (np.mean([v[what][m] for v in found.variances], 0) for m in (few, many))
        statement = f"{called} varies less with {many} samples than with {few} (fall of its variance)"
        yield compare(
            f"variance, {what}", statement, one, other, decisive=evaluation.decisive, resamples=evaluation.resamples
        )
