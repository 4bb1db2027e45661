"""The report of a `dynamic_retrieval` run: measures, tables, plots and the claims of the spec (section 10b)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mobula.evaluation.claims import compare
from mobula.evaluation.ranking import MEASURES
from mobula.experiment import Claim, Measure, Report
from mobula.retrieval.docids.families import NUMERIC, TEXT
from mobula.retrieval.dynamic import measures
from mobula.retrieval.dynamic.config import MULTI, NGRAMS, Config
from mobula.retrieval.dynamic.follow import ORACLE, TENDENCY, Followed, Protocol
from mobula.retrieval.dynamic.measures import STATISTICS, Resampler, Statistic, claim, interval

MATCHES = 0.02  # "matches": not worse by two points or more
SEED = 0


@dataclass
class Findings:
    """What was measured of every system, with one bootstrap for all of them."""

    config: Config
    protocol: Protocol
    followed: dict[str, Followed]
    _resampled: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def resampler(self) -> Resampler:
        """Rows are drawn by their gold documents."""
        clusters = [[row.query.gold for row in rows] for rows in self.protocol.rows]
        return Resampler(clusters, self.config.evaluation.resamples, SEED)

    @property
    def rows(self) -> int:
        """Test rows of all sessions."""
        return sum(len(rows) for rows in self.protocol.rows)

    def p(self, system: str, measure: str) -> np.ndarray:
        """P f64[T, T]."""
        return measures.means(self.followed[system].cells.values[measure])

    def resampled(self, system: str, measure: str) -> np.ndarray:
        """P f64[R, T, T], resampled."""
        name = f"{system}\n{measure}"
        if name not in self._resampled:
            self._resampled[name] = self.resampler.cells(self.followed[system].cells.values[measure])
        return self._resampled[name]

    def statistic(self, system: str, statistic: Statistic, measure: str) -> Measure:
        """A statistic of a system with its interval."""
        value = float(statistic(self.p(system, measure)))
        return interval(value, statistic(self.resampled(system, measure)), self.rows)

    def difference(self, better: str, worse: str, statistic: Statistic, measure: str) -> Measure:
        """A statistic of one system minus that of another, paired."""
        value = statistic(self.p(better, measure)) - statistic(self.p(worse, measure))
        drawn = statistic(self.resampled(better, measure)) - statistic(self.resampled(worse, measure))
        return interval(float(value), drawn, self.rows)

    def fact(self, system: str, name: str) -> tuple[float, np.ndarray]:
        """Mean over sessions 1..n of a fact of the diagonal, and its resamples f64[R]."""
        values = self.followed[system].cells.diagonal[name]
        return float(measures.diagonal_means(values)[1:].mean()), self.resampler.diagonal(values)[:, 1:].mean(1)

    def has(self, system: str) -> bool:
        """Whether a system was followed."""
        return system in self.followed

    @property
    def numeric(self) -> list[str]:
        """Trained systems of one numeric docid per document."""
        return [name for name in self.followed if name.partition("/")[2] in NUMERIC and not name.startswith("adc")]

    @property
    def texts(self) -> list[str]:
        """Trained systems with text docids."""
        return [n for n in self.followed if n in NGRAMS or n.partition("/")[2] in TEXT]

    @property
    def multi(self) -> str | None:
        """The multi_chunk system, if there is one."""
        return next((name for name in self.followed if name.endswith(f"/{MULTI}")), None)


def fill(report: Report, found: Findings, rates: list[list[Any]]) -> None:
    """Write everything into the report."""
    primary = found.config.evaluation.primary
    for system, followed in found.followed.items():
        for measure in (m for m in MEASURES if m in followed.cells.values):
            for name, statistic in STATISTICS.items():
                report.measures[f"{system}/{name}/{measure}"] = found.statistic(system, statistic, measure)
        report.measures.update(_cells(found, system, primary))
    report.tables["Sessions"] = _sessions(found)
    report.tables["Systems"] = _systems(found, primary)
    report.tables[f"{primary} of the documents that have just arrived, P[t, t] %"] = _diagonal(found, primary)
    report.tables[f"{primary} of the initial documents, P[t, 0] %"] = _first_column(found, primary)
    report.tables["Leaning to the initial documents"] = _bias(found)
    if attribution := _attribution(found, primary):
        report.tables["Where the drop comes from"] = attribution
    report.tables["Docids at the last session"] = _docids(found)
    report.tables["Latency, size and admission"] = _cost(found)
    report.tables["Learning rates"] = [["system", "rate", "dev value of its trial", "chosen"], *rates]
    report.claims.extend(claims(found))
    report.plots.update(_plots(found, primary))


def claims(found: Findings) -> Iterator[Claim]:
    """Every claim whose systems were followed."""
    yield from _finer_and_better(found)
    yield from _bias_claims(found)
    yield from _multi_claims(found)
    yield from _stability(found)


def _ga(found: Findings, name: str, statement: str, better: str, worse: str, margin: float = 0.0) -> Claim | None:
    if not (found.has(better) and found.has(worse)):
        return None
    evaluation = found.config.evaluation
    effect = found.difference(better, worse, measures.generalisation, evaluation.primary)
    text = f"{statement} ({better} against {worse}, GA of {evaluation.primary})"
    learnt = better not in found.texts or _learnt(found, better)
    if not learnt:
        text += f"; {better} has not learnt the initial documents as well as code-only retrieval finds them"
    return claim(name, text, effect, margin=margin, decisive=evaluation.decisive and learnt)


def _learnt(found: Findings, system: str) -> bool:
    """Whether a text system finds initial documents as well as code-only retrieval, or shows nothing of docids."""
    primary = found.config.evaluation.primary
    reference = [float(found.p(name, primary)[0, 0]) for name in found.followed if name.startswith("adc/")]
    return not reference or float(found.p(system, primary)[0, 0]) >= max(reference)


def _finer_and_better(found: Findings) -> Iterator[Claim]:
    pairs: list[tuple[str, str, str, str, float]] = []
    for text in found.texts:
        for numeric in found.numeric:
            pairs.append(("F1", "text docids generalise better than numeric ones", text, numeric, 0.0))
    by_family = {name.partition("/")[2]: name for name in found.texts if "/" in name}
    chain = ["ngram", by_family.get("text.keywords", ""), by_family.get("text.title", "")]
    for finer, coarser in itertools.pairwise(chain):
        pairs.append(("F2", "the finer the docid, the better", finer, coarser, 0.0))
    if found.multi:
        counts = sorted([*found.config.evaluation.chunk_counts, found.config.chunks.per_document], reverse=True)
        names = [_count_name(found, m) for m in counts]
        for more, fewer in itertools.pairwise(names):
            pairs.append(("F2-chunks", "more chunks a document are better", more, fewer, 0.0))
    for text in ("ngram", "multiview"):
        pairs.append(("F3-bm25", "fine text docids beat BM25", text, "bm25", 0.0))
        pairs.append(("F3-dense", f"fine text docids match dense (within {MATCHES:.0%})", text, "dual", MATCHES))
    for name, statement, better, worse, margin in pairs:
        made = _ga(found, f"{name} {better} {worse}", statement, better, worse, margin)
        if made is not None:
            yield made


def _count_name(found: Findings, count: int) -> str:
    return found.multi if count == found.config.chunks.per_document else f"{found.multi} m={count}"  # type: ignore[return-value]


def _bias_claims(found: Findings) -> Iterator[Claim]:
    decisive = found.config.evaluation.decisive
    for numeric in found.numeric:
        if found.has("bm25"):
            effect = _paired_fact(found, numeric, "bm25", TENDENCY)
            yield claim(
                f"G-tendency {numeric}",
                f"numeric docids lean to the initial documents more than relevance does ({numeric} against bm25, "
                "share of initial documents in the top 10 of new documents' queries)",
                effect,
                decisive=decisive,
            )
        if found.has("dense"):
            effect = _oracle_gain(found, numeric, "dense")
            yield claim(
                f"G-oracle {numeric}",
                f"that leaning is what costs ({numeric}: gain of decoding among the session's documents alone, "
                "minus dense's gain; Hit@10)",
                effect,
                decisive=decisive,
            )


def _paired_fact(found: Findings, a: str, b: str, name: str) -> Measure:
    (left, drawn_left), (right, drawn_right) = found.fact(a, name), found.fact(b, name)
    return interval(left - right, drawn_left - drawn_right, found.rows)


def _oracle_gain(found: Findings, a: str, b: str) -> Measure:
    """(O - P) of one system minus (O - P) of another, over sessions 1..n."""
    values, drawn = [], []
    for system in (a, b):
        oracle, oracle_drawn = found.fact(system, ORACLE)
        values.append(oracle - float(measures.generalisation(found.p(system, "Hit@10"))))
        drawn.append(oracle_drawn - measures.generalisation(found.resampled(system, "Hit@10")))
    return interval(values[0] - values[1], drawn[0] - drawn[1], found.rows)


def _multi_claims(found: Findings) -> Iterator[Claim]:
    multi = found.multi
    if multi is None:
        return
    evaluation = found.config.evaluation
    single = f"{multi.partition('/')[0]}/{found.config.docid.family}"
    made = _ga(found, "H-better", "several docids generalise better than one", multi, single)
    if made is not None:
        yield made
    if found.has(single) and found.has("ngram"):
        yield _gap_closed(found, multi, single)
        yield compare(
            "H-latency",
            f"numeric latency is kept ({multi} against ngram; effect is the mean log ratio of ms)",
            np.log(found.followed["ngram"].ms),
            np.log(found.followed[multi].ms),
            decisive=evaluation.decisive,
            resamples=evaluation.resamples,
        )


def _gap_closed(found: Findings, multi: str, single: str) -> Claim:
    """(GA multi - GA single) / (GA ngram - GA single); undecided where the denominator may be zero."""
    primary = found.config.evaluation.primary
    gap = found.difference("ngram", single, measures.generalisation, primary)
    ga = [measures.generalisation(found.resampled(name, primary)) for name in (multi, single, "ngram")]
    values = [float(measures.generalisation(found.p(name, primary))) for name in (multi, single, "ngram")]
    defined = gap.low > 0
    drawn = (ga[0] - ga[1]) / np.where(np.abs(ga[2] - ga[1]) > 1e-9, ga[2] - ga[1], np.nan)
    share = (values[0] - values[1]) / ((values[2] - values[1]) or 1.0)
    effect = interval(share, drawn, found.rows)
    text = f"several docids close part of the gap to n-grams ({multi}; effect is the share of the gap, GA of {primary})"
    if not defined:
        text += "; the gap's own interval holds zero, so the share is not defined"
    return claim("H-gap", text, effect, decisive=found.config.evaluation.decisive and defined)


def _stability(found: Findings) -> Iterator[Claim]:
    primary, decisive = found.config.evaluation.primary, found.config.evaluation.decisive
    for steady in ("bm25", "dense"):
        for numeric in found.numeric:
            if found.has(steady):
                effect = found.difference(numeric, steady, measures.spread, primary)
                text = f"{steady} is steadier over sessions than {numeric} (range of P[t, t], {primary})"
                yield claim(f"K-{steady} {numeric}", text, effect, decisive=decisive)


def _cells(found: Findings, system: str, measure: str) -> Iterator[tuple[str, Measure]]:
    """Every P[t, i] of a measure."""
    p, drawn = found.p(system, measure), found.resampled(system, measure)
    for t in range(len(p)):
        for i in range(t + 1):
            made = interval(float(p[t, i]), drawn[:, t, i], len(found.protocol.rows[i]))
            yield f"{system}/P[{t},{i}]/{measure}", made


def _sessions(found: Findings) -> list[list[Any]]:
    sizes = found.protocol.sizes()
    rows = [
        [t, len(found.protocol.sessions.documents(t)), size, len(rows), round(10 / size, 5)]
        for t, (size, rows) in enumerate(zip(sizes, found.protocol.rows, strict=True))
    ]
    return [["session", "documents", "cumulative", "test rows", "chance Hit@10"], *rows]


def _systems(found: Findings, primary: str) -> list[list[Any]]:
    header = ["system", *(f"{name} {primary}" for name in STATISTICS), "GA Hit@1", "GA MRR@10", "filled %"]
    rows = []
    for system, followed in found.followed.items():
        shown = [_shown(found.statistic(system, statistic, primary)) for statistic in STATISTICS.values()]
        others = [
            round(100 * float(measures.generalisation(found.p(system, m))), 1) if m in followed.cells.values else None
            for m in ("Hit@1", "MRR@10")
        ]
        rows.append([system, *shown, *others, round(100 * followed.cells.filled, 1)])
    return [header, *rows]


def _shown(value: Measure) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _diagonal(found: Findings, primary: str) -> list[list[Any]]:
    header = ["system", *(f"t={t}" for t in range(found.protocol.sessions.count))]
    return [header, *([s, *_percent(np.diagonal(found.p(s, primary)))] for s in found.followed)]


def _first_column(found: Findings, primary: str) -> list[list[Any]]:
    header = ["system", *(f"t={t}" for t in range(found.protocol.sessions.count))]
    return [header, *([s, *_percent(found.p(s, primary)[:, 0])] for s in found.followed)]


def _percent(values: np.ndarray) -> list[float]:
    return [round(100 * float(value), 1) for value in values]


def _bias(found: Findings) -> list[list[Any]]:
    """Share of initial documents in the top ten of new documents' queries, beside their share of the corpus."""
    sizes = found.protocol.sizes()
    expected = float(np.mean([sizes[0] / size for size in sizes[1:]]))
    rows = []
    for system in found.followed:
        share, _ = found.fact(system, TENDENCY)
        oracle, _ = found.fact(system, ORACLE)
        ga = float(measures.generalisation(found.p(system, "Hit@10")))
        rows.append([system, *_percent(np.array([share, share - expected, ga, oracle, oracle - ga]))])
    header = ["system", "D0 in top 10 %", "minus D0's share", "GA Hit@10", "among the session alone", "gain"]
    return [header, *rows]


def _attribution(found: Findings, primary: str) -> list[list[Any]]:
    """The drop from P[0,0] to GA of each model on quantised codes, in the quantiser's part and the model's own."""

    def drop(p: np.ndarray) -> np.ndarray:
        return measures.initial(p) - measures.generalisation(p)

    rows = []
    for system in found.numeric:
        reference = f"adc/{system.partition('/')[2]}"
        if found.has(reference):
            whole, quantiser = (found.statistic(name, drop, primary) for name in (system, reference))
            own = found.difference(system, reference, drop, primary)
            rows.append([system, *(_shown(part) for part in (whole, quantiser, own))])
    return [["system", f"drop of {primary}", "quantiser part", "model part"], *rows] if rows else []


def _docids(found: Findings) -> list[list[Any]]:
    names = ["docids", "distinct", "collision_rate", "largest_bucket", "new_codes"]
    rows = [[s, *(f.docids[name] for name in names), f.unreachable] for s, f in found.followed.items() if f.docids]
    header = ["system", "docids", "distinct", "share that collide", "largest bucket"]
    return [[*header, "later docids with a code new to the model", "documents never admitted"], *rows]


def _cost(found: Findings) -> list[list[Any]]:
    rows = []
    for system, followed in found.followed.items():
        documents = sum(count for count, _ in followed.admitted)
        admission = sum(ms for _, ms in followed.admitted) / max(1, documents)  # ms a document are s per 1,000
        p50, p95 = np.percentile(followed.ms, [50, 95]) if len(followed.ms) else (np.nan, np.nan)
        size = followed.bytes
        total = found.protocol.sizes()[-1]
        each = None if size is None else round(size / total, 1)
        rows.append([system, round(float(p50), 2), round(float(p95), 2), round(admission, 3), size, each])
    header = ["system", "p50 ms", "p95 ms", "s per 1,000 added documents", "index bytes", "bytes a document"]
    return [header, *rows]


def _plots(found: Findings, primary: str) -> dict[str, dict[str, Any]]:
    sessions = range(found.protocol.sessions.count)
    new = {s: [(t, float(found.p(s, primary)[t, t])) for t in sessions] for s in found.followed}
    old = {s: [(t, float(found.p(s, primary)[t, 0])) for t in sessions] for s in found.followed}
    cost = {
        s: [(float(np.median(f.ms)), float(measures.generalisation(found.p(s, primary))))]
        for s, f in found.followed.items()
        if len(f.ms)
    }
    return {
        "new_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, t]", "series": new},
        "initial_documents": {"kind": "line", "x": "session t", "y": f"{primary}, P[t, 0]", "series": old},
        "pareto": {"kind": "pareto", "x": "ms per query", "y": f"GA of {primary}", "series": cost, "log_x": True},
    }
