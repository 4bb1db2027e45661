"""The report of a `dynamic_retrieval` run: measures, tables, plots and the claims of the spec (section 10b)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mobula.evaluation.claims import compare, exceeds
from mobula.evaluation.intervals import Estimate, Resampler
from mobula.evaluation.ranking import MEASURES
from mobula.experiment import Claim, Measure, Report
from mobula.retrieval.docids.families import NUMERIC, TEXT
from mobula.retrieval.dynamic import measures
from mobula.retrieval.dynamic.config import MULTI, NGRAMS, Config
from mobula.retrieval.dynamic.evaluate_sessions import INITIAL_SHARE, ORACLE, EvaluationProtocol, SessionResults
from mobula.retrieval.dynamic.measures import STATISTICS, Statistic

MATCHES = 0.02  # "matches": not worse by two points or more
KEPT = 32  # resampled tables held at a time: claims ask for those of one measure again and again


@dataclass
class Results:
    """What was measured of every system, with one bootstrap for all of them."""

    config: Config
    protocol: EvaluationProtocol
    systems: dict[str, SessionResults]

    @cached_property
    def labels(self) -> list[list[int]]:
        """The cluster of every row, session by session."""
        return measures.clusters(self.protocol.rows)

    @cached_property
    def resampler(self) -> Resampler:
        """Rows are drawn by their clusters, the same ones for all systems."""
        return Resampler(list(itertools.chain(*self.labels)), resamples=self.config.evaluation.resamples)

    @property
    def rows(self) -> int:
        """Test rows of all sessions."""
        return sum(len(rows) for rows in self.protocol.rows)

    def p(self, system: str, measure: str) -> np.ndarray:
        """P f64[T, T]."""
        return measures.means(self.systems[system].cells.values[measure])

    @cached_property
    def table(self) -> Callable[[str, str], np.ndarray]:
        """P f64[R + 1, S, T, T] of a system and measure: of the sample and of R resamples, by seed."""
        return lru_cache(maxsize=KEPT)(
            lambda system, measure: self._resampled(self.systems[system].cells.values[measure])
        )

    def diagonal(self, system: str, name: str) -> np.ndarray:
        """A fact of the diagonal f64[R + 1, S, T]."""
        return self._resampled(self.systems[system].cells.diagonal[name])

    def statistic(self, system: str, statistic: Statistic, measure: str) -> Measure:
        """A statistic of a system with its interval."""
        return self.estimate(statistic, self.table(system, measure)).measure()

    def difference(self, better: str, worse: str, statistic: Statistic, measure: str) -> Estimate:
        """A statistic of one system minus that of another, paired."""
        tables = self.table(better, measure), self.table(worse, measure)
        return self.estimate(lambda a, b: statistic(a) - statistic(b), *tables)

    def estimate(self, statistic: Callable[..., np.ndarray], *tables: np.ndarray) -> Estimate:
        """A statistic of tables of all rows, with what its interval needs."""
        return self.resampler.estimate(statistic, *tables, n=self.rows)

    def _resampled(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """f64[R + 1, S, ..., T] from ``values[i]`` f64[S, ..., rows of session i]."""
        sessions = zip(values, self.labels, strict=True)
        return np.stack([self.resampler.means(session, labels) for session, labels in sessions], axis=-1)

    def has(self, system: str) -> bool:
        """Whether a system was seen."""
        return system in self.systems

    @property
    def numeric(self) -> list[str]:
        """Trained systems of one numeric docid per document."""
        return [name for name in self.systems if name.partition("/")[2] in NUMERIC and not name.startswith("adc")]

    @property
    def texts(self) -> list[str]:
        """Trained systems with text docids."""
        return [n for n in self.systems if n in NGRAMS or n.partition("/")[2] in TEXT]

    @property
    def multi(self) -> str | None:
        """The multi_chunk system, if there is one."""
        return next((name for name in self.systems if name.endswith(f"/{MULTI}")), None)


def build_report(report: Report, results: Results, rates: list[list[Any]]) -> None:
    """Write everything into the report."""
    primary = results.config.evaluation.primary
    for system, seen in results.systems.items():
        for measure in (m for m in MEASURES if m in seen.cells.values):
            for name, statistic in STATISTICS.items():
                report.measures[f"{system}/{name}/{measure}"] = results.statistic(system, statistic, measure)
        report.measures.update(_cells(results, system, primary))
    report.tables["Sessions"] = _sessions(results)
    report.tables["Systems"] = _systems(results, primary)
    report.tables[f"{primary} of the documents that have just arrived, P[t, t] %"] = _diagonal(results, primary)
    report.tables[f"{primary} of the initial documents, P[t, 0] %"] = _first_column(results, primary)
    report.tables["Leaning to the initial documents"] = _bias(results)
    if attribution := _attribution(results, primary):
        report.tables["Where the drop comes from"] = attribution
    report.tables["Docids at the last session"] = _docids(results)
    report.tables["Latency, size and admission"] = _cost(results)
    report.tables["Learning rates"] = [["system", "rate", "dev value of its trial", "chosen"], *rates]
    report.claims.extend(claims(results))
    report.plots.update(_plots(results, primary))


def claims(results: Results) -> Iterator[Claim]:
    """Every claim whose systems were seen."""
    yield from _finer_and_better(results)
    yield from _bias_claims(results)
    yield from _multi_claims(results)
    yield from _stability(results)


def _ga(results: Results, name: str, statement: str, better: str, worse: str, margin: float = 0.0) -> Claim | None:
    if not (results.has(better) and results.has(worse)):
        return None
    evaluation = results.config.evaluation
    effect = results.difference(better, worse, measures.generalisation, evaluation.primary)
    text = f"{statement} ({better} against {worse}, GA of {evaluation.primary})"
    learnt = better not in results.texts or _learnt(results, better)
    if not learnt:
        text += f"; {better} has not learnt the initial documents as well as code-only retrieval finds them"
    return exceeds(name, text, effect, margin=margin, decisive=evaluation.decisive and learnt)


def _learnt(results: Results, system: str) -> bool:
    """Whether a text system finds initial documents as well as code-only retrieval, or shows nothing of docids."""
    primary = results.config.evaluation.primary
    reference = [float(results.p(name, primary)[0, 0]) for name in results.systems if name.startswith("adc/")]
    return not reference or float(results.p(system, primary)[0, 0]) >= max(reference)


def _finer_and_better(results: Results) -> Iterator[Claim]:
    pairs: list[tuple[str, str, str, str, float]] = []
    for text in results.texts:
        for numeric in results.numeric:
            pairs.append(("F1", "text docids generalise better than numeric ones", text, numeric, 0.0))
    by_family = {name.partition("/")[2]: name for name in results.texts if "/" in name}
    chain = ["ngram", by_family.get("text.keywords", ""), by_family.get("text.title", "")]
    for finer, coarser in itertools.pairwise(chain):
        pairs.append(("F2", "the finer the docid, the better", finer, coarser, 0.0))
    if results.multi:
        counts = sorted([*results.config.evaluation.chunk_counts, results.config.chunks.per_document], reverse=True)
        names = [_count_name(results, m) for m in counts]
        for more, fewer in itertools.pairwise(names):
            pairs.append(("F2-chunks", "more chunks a document are better", more, fewer, 0.0))
    for text in ("ngram", "multiview"):
        pairs.append(("F3-bm25", "fine text docids beat BM25", text, "bm25", 0.0))
        pairs.append(("F3-dense", f"fine text docids match dense (within {MATCHES:.0%})", text, "dual", MATCHES))
    for name, statement, better, worse, margin in pairs:
        made = _ga(results, f"{name} {better} {worse}", statement, better, worse, margin)
        if made is not None:
            yield made


def _count_name(results: Results, count: int) -> str:
    return results.multi if count == results.config.chunks.per_document else f"{results.multi} m={count}"  # type: ignore[return-value]


def _bias_claims(results: Results) -> Iterator[Claim]:
    decisive = results.config.evaluation.decisive
    for numeric in results.numeric:
        if results.has("bm25"):
            effect = _share_difference(results, numeric, "bm25")
            yield exceeds(
                f"G-initial-share {numeric}",
                f"numeric docids lean to the initial documents more than relevance does ({numeric} against bm25, "
                "share of initial documents in the top 10 of new documents' queries)",
                effect,
                decisive=decisive,
            )
        if results.has("dense"):
            effect = _oracle_gain(results, numeric, "dense")
            yield exceeds(
                f"G-oracle {numeric}",
                f"that leaning is what costs ({numeric}: gain of decoding among the session's documents alone, "
                "minus dense's gain; Hit@10)",
                effect,
                decisive=decisive,
            )


def _arriving(diagonal: np.ndarray) -> np.ndarray:
    """Mean over sessions 1..n of a fact of the diagonal."""
    return diagonal[..., 1:].mean(-1)


def _share_difference(results: Results, a: str, b: str) -> Estimate:
    """Initial-document share of one system minus that of another, over sessions 1..n."""
    tables = results.diagonal(a, INITIAL_SHARE), results.diagonal(b, INITIAL_SHARE)
    return results.estimate(lambda ours, theirs: _arriving(ours) - _arriving(theirs), *tables)


def _oracle_gain(results: Results, a: str, b: str) -> Estimate:
    """(O - P) of one system minus (O - P) of another, over sessions 1..n."""
    ga = measures.generalisation
    return results.estimate(
        lambda oracle, p, other_oracle, other_p: _arriving(oracle) - ga(p) - (_arriving(other_oracle) - ga(other_p)),
        *(table for s in (a, b) for table in (results.diagonal(s, ORACLE), results.table(s, "Hit@10"))),
    )


def _multi_claims(results: Results) -> Iterator[Claim]:
    multi = results.multi
    if multi is None:
        return
    evaluation = results.config.evaluation
    single = f"{multi.partition('/')[0]}/{results.config.docid.family}"
    made = _ga(results, "H-better", "several docids generalise better than one", multi, single)
    if made is not None:
        yield made
    if results.has(single) and results.has("ngram"):
        yield _gap_closed(results, multi, single)
        yield compare(
            "H-latency",
            f"numeric latency is kept ({multi} against ngram; effect is the mean log ratio of ms)",
            np.log(results.systems["ngram"].ms),
            np.log(results.systems[multi].ms),
            decisive=evaluation.decisive,
            resamples=evaluation.resamples,
        )


def _gap_closed(results: Results, multi: str, single: str) -> Claim:
    """(GA multi - GA single) / (GA ngram - GA single); undecided where the denominator may be zero."""
    primary, ga = results.config.evaluation.primary, measures.generalisation

    def share(several: np.ndarray, one: np.ndarray, ngram: np.ndarray) -> np.ndarray:
        gap = ga(ngram) - ga(one)
        return (ga(several) - ga(one)) / np.where(np.abs(gap) > 1e-9, gap, np.inf)  # of no gap nothing is closed

    effect = results.estimate(share, *(results.table(name, primary) for name in (multi, single, "ngram")))
    defined = results.difference("ngram", single, ga, primary).interval()[0] > 0
    text = f"several docids close part of the gap to n-grams ({multi}; effect is the share of the gap, GA of {primary})"
    if not defined:
        text += "; the gap's own interval holds zero, so the share is not defined"
    return exceeds("H-gap", text, effect, decisive=results.config.evaluation.decisive and defined)


def _stability(results: Results) -> Iterator[Claim]:
    primary, decisive = results.config.evaluation.primary, results.config.evaluation.decisive
    for steady in ("bm25", "dense"):
        for numeric in results.numeric:
            if results.has(steady):
                effect = results.difference(numeric, steady, measures.spread, primary)
                text = f"{steady} is steadier over sessions than {numeric} (range of P[t, t], {primary})"
                yield exceeds(f"K-{steady} {numeric}", text, effect, decisive=decisive)


def _cells(results: Results, system: str, measure: str) -> Iterator[tuple[str, Measure]]:
    """Every P[t, i] of a measure."""
    table = results.table(system, measure)
    for i, rows in enumerate(results.protocol.rows):
        for t in range(i, len(results.protocol.rows)):
            cell = results.resampler.estimate(np.asarray, table[..., t, i], n=len(rows))
            yield f"{system}/P[{t},{i}]/{measure}", cell.measure()


def _sessions(results: Results) -> list[list[Any]]:
    sizes = results.protocol.sizes()
    rows = [
        [t, len(results.protocol.sessions.documents(t)), size, len(rows), round(10 / size, 5)]
        for t, (size, rows) in enumerate(zip(sizes, results.protocol.rows, strict=True))
    ]
    return [["session", "documents", "cumulative", "test rows", "chance Hit@10"], *rows]


def _systems(results: Results, primary: str) -> list[list[Any]]:
    header = ["system", *(f"{name} {primary}" for name in STATISTICS), "GA Hit@1", "GA MRR@10", "filled %"]
    rows = []
    for system, seen in results.systems.items():
        shown = [_shown(results.statistic(system, statistic, primary)) for statistic in STATISTICS.values()]
        others = [
            round(100 * float(measures.generalisation(results.p(system, m))), 1) if m in seen.cells.values else None
            for m in ("Hit@1", "MRR@10")
        ]
        rows.append([system, *shown, *others, round(100 * seen.cells.filled, 1)])
    return [header, *rows]


def _shown(value: Measure) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _diagonal(results: Results, primary: str) -> list[list[Any]]:
    header = ["system", *(f"t={t}" for t in range(results.protocol.sessions.count))]
    return [header, *([s, *_percent(np.diagonal(results.p(s, primary)))] for s in results.systems)]


def _first_column(results: Results, primary: str) -> list[list[Any]]:
    header = ["system", *(f"t={t}" for t in range(results.protocol.sessions.count))]
    return [header, *([s, *_percent(results.p(s, primary)[:, 0])] for s in results.systems)]


def _percent(values: np.ndarray) -> list[float]:
    return [round(100 * float(value), 1) for value in values]


def _bias(results: Results) -> list[list[Any]]:
    """Share of initial documents in the top ten of new documents' queries, beside their share of the corpus."""
    sizes = results.protocol.sizes()
    expected = float(np.mean([sizes[0] / size for size in sizes[1:]]))
    rows = []
    for system in results.systems:
        seen = results.systems[system].cells.diagonal
        share, oracle = (np.mean([session.mean() for session in seen[name][1:]]) for name in (INITIAL_SHARE, ORACLE))
        ga = float(measures.generalisation(results.p(system, "Hit@10")))
        rows.append([system, *_percent(np.array([share, share - expected, ga, oracle, oracle - ga]))])
    header = ["system", "D0 in top 10 %", "minus D0's share", "GA Hit@10", "among the session alone", "gain"]
    return [header, *rows]


def _attribution(results: Results, primary: str) -> list[list[Any]]:
    """The drop from P[0,0] to GA of each model on quantised codes, in the quantiser's part and the model's own."""

    def drop(p: np.ndarray) -> np.ndarray:
        return measures.initial(p) - measures.generalisation(p)

    rows = []
    for system in results.numeric:
        reference = f"adc/{system.partition('/')[2]}"
        if results.has(reference):
            whole, quantiser = (results.statistic(name, drop, primary) for name in (system, reference))
            own = results.difference(system, reference, drop, primary).measure()
            rows.append([system, *(_shown(part) for part in (whole, quantiser, own))])
    return [["system", f"drop of {primary}", "quantiser part", "model part"], *rows] if rows else []


def _docids(results: Results) -> list[list[Any]]:
    names = ["docids", "distinct", "collision_rate", "largest_bucket", "new_codes"]
    rows = [[s, *(f.docids[name] for name in names), f.unreachable] for s, f in results.systems.items() if f.docids]
    header = ["system", "docids", "distinct", "share that collide", "largest bucket"]
    return [[*header, "later docids with a code new to the model", "documents never inserted"], *rows]


def _cost(results: Results) -> list[list[Any]]:
    rows = []
    for system, seen in results.systems.items():
        documents = sum(count for count, _ in seen.inserted)
        admission = sum(ms for _, ms in seen.inserted) / max(1, documents)  # ms a document are s per 1,000
        p50, p95 = np.percentile(seen.ms, [50, 95]) if len(seen.ms) else (np.nan, np.nan)
        size = seen.bytes
        total = results.protocol.sizes()[-1]
        each = None if size is None else round(size / total, 1)
        rows.append([system, round(float(p50), 2), round(float(p95), 2), round(admission, 3), size, each])
    header = ["system", "p50 ms", "p95 ms", "s per 1,000 added documents", "index bytes", "bytes a document"]
    return [header, *rows]


def _plots(results: Results, primary: str) -> dict[str, dict[str, Any]]:
    sessions = range(results.protocol.sessions.count)
    new = {s: [(t, float(results.p(s, primary)[t, t])) for t in sessions] for s in results.systems}
    old = {s: [(t, float(results.p(s, primary)[t, 0])) for t in sessions] for s in results.systems}
    cost = {
        s: [(float(np.median(f.ms)), float(measures.generalisation(results.p(s, primary))))]
        for s, f in results.systems.items()
        if len(f.ms)
    }
    return {
        "new_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, t]", "series": new},
        "initial_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, 0]", "series": old},
        "pareto": {"kind": "pareto", "x": "ms per query", "y": f"GA of {primary}", "series": cost, "log_x": True},
    }
