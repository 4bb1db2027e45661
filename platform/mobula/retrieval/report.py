"""The report of a DiffuGR run: measures, tables, plots, claims and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobula.evaluation import ranking
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Report
from mobula.retrieval.arms import Arm
from mobula.retrieval.claims import Claims
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import Recovery
from mobula.retrieval.diagnostics import Levels
from mobula.retrieval.prepare import Material
from mobula.retrieval.results import Split
from mobula.retrieval.systems import Decoded, budgets, decoded
from mobula.study import System

SEEN, UNSEEN = "gold document has training queries", "gold document has none"
SHOWN_LEVELS = 16


@dataclass(frozen=True)
class Measured:
    """What was measured of a run: outcomes by split, the decoding that dev prefers, and recovery, one a seed."""

    config: Config
    material: Material
    splits: Mapping[str, Split]
    chosen: Decoded
    recovered: Mapping[Decoded, Sequence[Recovery]]
    bm25: tuple[float, float]  # k1 and b
    rates: list[list[Any]]
    levels: Mapping[Arm, Sequence[Levels]]  # one a seed
    sizes: Mapping[str, Mapping[str, int]]  # bytes of weights and index by retriever

    @property
    def test(self) -> Split:
        """The split that claims are about."""
        return self.splits["test"]

    @property
    def seen(self) -> np.ndarray:
        """Whether a gold document of a test query has training queries, bool[Q]."""
        trained = {gold for query in self.material.data.queries.get("train", []) for gold in query.gold}
        return np.array([any(gold in trained for gold in query.gold) for query in self.test.queries])

    @property
    def twin_tuned(self) -> bool:
        """Whether dev preferred one learning rate of the twin to another."""
        values = {value for name, _, value, _ in self.rates if name == str(self.config.twin) and value != "diverged"}
        return len(values - {None}) > 1


def fill(report: Report, run: Measured) -> None:
    """Write everything into the report."""
    report.tables["Quality and latency, test queries"] = headline(run)
    for name, split in run.splits.items():
        report.tables[f"{name}: {len(split.queries)} queries, {split.documents} documents"] = split.table()
        prefix = "" if name == "test" else f"{name}/"
        for system, outcome in split.outcomes.items():
            for measure in outcome.values:
                report.measures[f"{prefix}{system.label}/{measure}"] = split.measure(system, measure)
    claims = Claims(run.config, run.test, run.chosen, run.recovered, run.seen, run.twin_tuned)
    report.claims.extend(claims.all())
    report.tables["By stratum"] = strata(run)
    report.tables["Early-error recovery"] = _recovery(run)
    report.tables["Gold docids under the models"] = _levels(run)
    report.tables["Docids"] = _docids(run)
    report.tables["Bytes"] = [["retriever", "weights", "index"], *([n, *s.values()] for n, s in run.sizes.items())]
    report.tables["Learning rates"] = [["arm", "rate", "dev value of its trial", "chosen"], *run.rates]
    report.plots.update(_plots(run))
    report.notes.extend(_notes(run))


def headline(run: Measured) -> list[list[Any]]:
    """The primary measure of the main arm by decoder and budget beside everything else, and what a query costs."""
    config, test = run.config, run.test
    shown: list[System] = [System(name) for name in ("bm25", "dense", "dual", "adc")]
    if config.twin is not None:
        shown += [decoded(config.twin, decoder="beam", beam=beam) for beam in config.evaluation.beams]
    shown += [decoded(config.main, decoder="one_pass")]
    shown += [decoded(config.main, decoder=d, steps=t) for d in config.evaluation.decoders for t in budgets(config)]
    primary = config.evaluation.primary
    rows: list[list[Any]] = [["system", f"{primary} %", "95 % interval", "network calls", "p50 ms", "p95 ms"]]
    for system in (s for s in shown if s in test.outcomes and primary in test.outcomes[s].values):
        measure, outcome = test.measure(system, primary), test.outcomes[system]
        value, low, high = (f"{100 * number:.1f}" for number in (measure.value, measure.low, measure.high))
        ms = [f"{np.percentile(outcome.ms, p):.1f}" if len(outcome.ms) else "" for p in (50, 95)]
        rows.append([system.label, value, f"[{low}, {high}]", f"{outcome.fact('nfe') or 0.0:.1f}", *ms])
    return rows


def strata(run: Measured) -> list[list[Any]]:
    """The primary measure where the gold document has training queries and where it has none."""
    config, test, seen = run.config, run.test, run.seen
    primary = config.evaluation.primary
    rows: list[list[Any]] = [["system", "stratum", "queries", primary, "low", "high"]]
    for system in _in_strata(run):
        for label, mask in ((SEEN, seen), (UNSEEN, ~seen)):
            if mask.any():
                values = test.outcomes[system].per_query(primary)[:, mask]
                mean = mean_interval(values, resamples=config.evaluation.resamples)
                rows.append([system.label, label, mean.n, mean.value, mean.low, mean.high])
    return rows


def _in_strata(run: Measured) -> list[System]:
    """The baselines, the main arm, its twin and random docids, as far as there are any."""
    config = run.config
    shown: list[System] = [System(name) for name in ("bm25", "dense", "dual", "hamming", "adc")]
    shown += [run.chosen, decoded(config.main, decoder="one_pass")]
    if config.twin is not None:
        shown.append(decoded(config.twin, decoder="beam", beam=10))
    if config.random is not None:
        shown.append(decoded(config.random, decoder="one_pass"))
    return [system for system in dict.fromkeys(shown) if system in run.test.outcomes]


def _recovery(run: Measured) -> list[list[Any]]:
    rows: list[list[Any]] = [["decoding", "final docid right %", "gold in top 10 %"]]
    for system, seeds in run.recovered.items():
        final, top = (100 * float(np.mean([getattr(seed, part) for seed in seeds])) for part in ("final", "top"))
        rows.append([system.label, round(final, 1), round(top, 1)])
    return rows


def _levels(run: Measured) -> list[list[Any]]:
    """Means over seeds; levels of different arms are as many as their docids have."""
    head = ["arm", "-log p(docid|q), nats: NELBO, or of AR the value", "likeliest code right by level, %"]
    rows: list[list[Any]] = [[*head, "-log p(code) by level, nats"]]
    for arm, seeds in run.levels.items():
        right, nll = (np.mean([getattr(s, name) for s in seeds], (0, 1))[:SHOWN_LEVELS] for name in ("right", "nll"))
        by_level = (" ".join(f"{value:.{digits}f}" for value in row) for row, digits in ((100 * right, 1), (nll, 2)))
        rows.append([str(arm), round(float(np.mean([seed.bound for seed in seeds])), 2), *by_level])
    return rows


def _docids(run: Measured) -> list[list[Any]]:
    rows: list[list[Any]] = [["family", "levels", "codes", "collision %", "largest bucket", "entropy per level, bits"]]
    for family in sorted({arm.family for arm in run.config.parsed_arms}):
        table = run.material.prepared.table(family)
        facts = table.report()
        entropy = " ".join(f"{value:.1f}" for value in facts["entropy"][:SHOWN_LEVELS])
        collisions = round(100 * facts["collision_rate"], 1)
        rows.append([family, table.levels, table.width, collisions, facts["largest_bucket"], entropy])
    return rows


def _plots(run: Measured) -> dict[str, dict[str, Any]]:
    config, test = run.config, run.test
    primary, curves = config.evaluation.primary, {}
    for decoder in config.evaluation.decoders:
        budgeted = {t: decoded(config.main, decoder=decoder, steps=t) for t in budgets(config)}
        points = [(t, test.measure(system, primary).value) for t, system in budgeted.items()]
        curves[f"{config.main} {decoder}"] = points
    series: dict[str, list[tuple[float, float]]] = {}
    for system, outcome in test.outcomes.items():
        if len(outcome.ms) and primary in outcome.values:
            point = (float(np.median(outcome.ms)), float(outcome.per_query(primary).mean()))
            series.setdefault(system.arm, []).append(point)
    budget = {"kind": "line", "x": "denoising steps T", "y": primary, "series": curves}
    pareto = {"kind": "pareto", "x": "p50 latency, ms", "y": primary, "series": series, "log_x": True}
    return {"budget": budget, "pareto": pareto}


def _notes(run: Measured) -> Iterator[str]:
    k1, b = run.bm25
    yield f"BM25: k1={k1}, b={b}, chosen on dev"
    yield f"diffusion decoder chosen on dev: {run.chosen.label}"
    yield "diffugr-style (reconstruction): the paper gives neither code lengths nor rates; see the documentation"
    twin = run.config.twin
    if twin is not None:
        for beam in run.config.evaluation.beams:
            names = (str(run.config.main), decoded(twin, decoder="beam", beam=beam).label)
            note = ranking.width_note(names, (run.config.evaluation.depth, beam))
            if note:
                yield note
