"""Measuring systems on a test split: ranking measures per query and seed, cost, and latency side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mobula.data.records import Query
from mobula.errors import MobulaError
from mobula.evaluation import ranking
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Measure
from mobula.retrieval.diagnostics import code_ranks
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.search import SearchOptions, SearchResult
from mobula.study import System

BATCH = 64
WARM_UP = 5
TIMED_BATCH, BATCHES = 32, 5
DOCID_CUTS = (1, 10)

K = TypeVar("K", bound=Hashable)
Search = Callable[[Sequence[str], Sequence[SearchOptions]], list[SearchResult]]


@dataclass
class Timed(Generic[K]):
    """A retriever with fixed options under the key of its times. ``search`` is the full path from text to hits."""

    key: K
    search: Search
    options: SearchOptions


@dataclass
class Outcome:
    """What a system did on a split: ``values[measure]`` and ``calls`` (of the network) hold f64[Q] per seed.

    ``facts`` are means over queries, per seed. ``ms`` f64[Q] are milliseconds of queries one by one, ``batch_ms`` those
    of a query in batches of :data:`TIMED_BATCH`.
    """

    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    calls: list[np.ndarray] = field(default_factory=list)
    facts: dict[str, list[float]] = field(default_factory=dict)
    ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    batch_ms: float | None = None

    def per_query(self, measure: str) -> np.ndarray:
        """f64[S, Q] of a measure."""
        return np.stack(self.values[measure])

    def fact(self, name: str) -> float | None:
        """Mean over seeds of a cost or of a rate; None where the system has none."""
        seeds = self.facts.get(name)
        return float(np.mean(seeds)) if seeds else None


class Split:
    """A split under evaluation: its queries, and the outcome of every system measured on it."""

    def __init__(self, name: str, queries: list[Query], documents: int, directory: Path | None, resamples: int) -> None:
        self.name = name
        self.queries = queries
        self.documents = documents
        self.directory = directory
        self.resamples = resamples
        self.outcomes: dict[System, Outcome] = {}

    @property
    def texts(self) -> list[str]:
        """Query texts."""
        return [query.text for query in self.queries]

    @property
    def gold(self) -> list[set[str]]:
        """Gold document ids."""
        return [set(query.gold) for query in self.queries]

    def record(
        self,
        system: System,
        results: Sequence[SearchResult],
        *,
        seed: int = 0,
        width: int | None = None,
        table: DocidTable | None = None,
    ) -> None:
        """Add one seed's results of a system; writes them as a TREC run file if there is a folder.

        With the docid ``table``, documents that share a docid also count as one place, in "docid Hit@k".
        """
        hits = [result.hits for result in results]
        if self.directory is not None:
            tag = f"{system.slug}-s{seed}"
            ranking.write_run(self.directory / f"{tag}.trec", hits, self.queries, tag)
        outcome = self.outcomes.setdefault(system, Outcome())
        for measure, values in ranking.per_query(hits, self.queries, documents=self.documents, width=width).items():
            outcome.values.setdefault(measure, []).append(values)
        if table is not None:
            ranks = code_ranks([[hit.doc_id for hit in one] for one in hits], self.gold, table)
            for k in DOCID_CUTS:
                outcome.values.setdefault(f"docid Hit@{k}", []).append((ranks <= k).astype(np.float64))
        if all(result.raw_exact is not None for result in results):
            exact = np.array([result.raw_exact for result in results], dtype=np.float64)
            outcome.values.setdefault("raw_exact", []).append(exact)
        outcome.calls.append(np.array([result.nfe for result in results], dtype=np.float64))
        # Hit@1 is 0 or 1.
        for fact, value in _facts(results, outcome.values["Hit@1"][-1] > 0).items():
            outcome.facts.setdefault(fact, []).append(value)

    def outcome(self, system: System) -> Outcome:
        """What a system did.

        Raises:
            MobulaError: if it was not measured.
        """
        if system not in self.outcomes:
            known = ", ".join(system.label for system in self.outcomes)
            raise MobulaError(f"{system.label} was not measured on {self.name} (there are: {known})")
        return self.outcomes[system]

    def measure(self, system: System, measure: str) -> Measure:
        """A measure of a system with its interval over queries and seeds."""
        return mean_interval(self.outcome(system).per_query(measure), resamples=self.resamples)

    def table(self) -> list[list[Any]]:
        """Rows for the report: quality in per cent, raw rates, cost."""
        rates = ["raw valid %", "raw exact %", "rescued %"]
        docids = [f"docid Hit@{k}" for k in DOCID_CUTS]
        cost = ["NFE", "rows", "MFLOPs", "p50 ms", "p95 ms", f"batch of {TIMED_BATCH} ms"]
        header = ["system", *ranking.MEASURES, *docids, *rates, *cost]
        return [header, *(self._row(system) for system in self.outcomes)]

    def _row(self, system: System) -> list[Any]:
        outcome = self.outcomes[system]
        quality = [_percent(outcome, m) for m in (*ranking.MEASURES, *(f"docid Hit@{k}" for k in DOCID_CUTS))]
        rates = [_scaled(outcome.fact(fact), 100) for fact in ("raw_valid", "raw_exact", "rescued")]
        cost = [_scaled(outcome.fact(fact), 1) for fact in ("nfe", "rows", "mflops")]
        timed = [round(float(np.percentile(outcome.ms, p)), 2) if len(outcome.ms) else None for p in (50, 95)]
        batched = None if outcome.batch_ms is None else round(outcome.batch_ms, 2)
        return [system.label, *quality, *rates, *cost, *timed, batched]


def search_all(search: Search, texts: Sequence[str], options: SearchOptions) -> list[SearchResult]:
    """Search in batches, every query with the same options."""
    results: list[SearchResult] = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        results.extend(search(batch, [options] * len(batch)))
    return results


def time_systems(systems: Sequence[Timed[K]], texts: Sequence[str]) -> dict[K, np.ndarray]:
    """Milliseconds f64[Q] per query at batch 1, tokenisation and encoding included.

    Systems take turns on every query, so that a machine that slows down slows all of them; the first queries
    warm up and are dropped.
    """
    times: dict[K, list[float]] = {system.key: [] for system in systems}
    warm = list(texts[:WARM_UP])
    for position, text in enumerate([*warm, *texts]):
        for system in systems:
            started = time.perf_counter()
            system.search([text], [system.options])
            if position >= len(warm):
                times[system.key].append((time.perf_counter() - started) * 1000)
    return {key: np.array(values) for key, values in times.items()}


def time_batches(systems: Sequence[Timed[K]], texts: Sequence[str]) -> dict[K, float]:
    """Milliseconds a query in batches of :data:`TIMED_BATCH` (texts repeated to fill one): the median of 5 batches.

    Systems take turns, and a first batch warms up.
    """
    batch = [texts[i % len(texts)] for i in range(TIMED_BATCH)]
    times: dict[K, list[float]] = {system.key: [] for system in systems}
    for _ in range(1 + BATCHES):
        for system in systems:
            started = time.perf_counter()
            system.search(batch, [system.options] * TIMED_BATCH)
            times[system.key].append((time.perf_counter() - started) * 1000 / TIMED_BATCH)
    return {key: float(np.median(values[1:])) for key, values in times.items()}


def _facts(results: Sequence[SearchResult], right: np.ndarray) -> dict[str, float]:
    facts = {
        "nfe": float(np.mean([r.nfe for r in results])),
        "rows": float(np.mean([r.rows for r in results])),
        "steps": float(np.mean([r.steps_used for r in results])),
        "distinct_top1": len({r.hits[0].doc_id for r in results}) / len(results),
    }
    for name in ("raw_valid", "raw_exact"):
        known = [getattr(r, name) for r in results if getattr(r, name) is not None]
        if known:
            facts[name] = float(np.mean(known))
    # How often the ranking is right although the generated code is not.
    rescuable = [hit for hit, result in zip(right, results, strict=True) if result.raw_exact is False]
    if rescuable:
        facts["rescued"] = float(np.mean(rescuable))
    return facts


def _percent(outcome: Outcome, measure: str) -> float | None:
    return round(100 * float(outcome.per_query(measure).mean()), 1) if measure in outcome.values else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else round(factor * value, 1)
