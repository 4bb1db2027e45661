"""How often intervals over seeds and queries contain the truth, in simulation, and how wide they are.

Every case draws trials of a design with known truth: outcome = seed effect + query effect + their interaction, or a
0/1 outcome whose log-odds are that sum. The oracle's interval is +-1.96 standard deviations of the estimate over
trials. ``crossed`` is the percentile bootstrap that draws seeds and queries independently, for comparison.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobula.evaluation.intervals import LEVEL, Labels, Resampler, mean_interval, paired_difference
from mobula.experiment import Measure

TRIALS, RESAMPLES, QUERIES = 2000, 1000, 60
SEEDS = (2, 3, 5, 8)
QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Case:
    """Standard deviations of the effects of seeds, queries and both; ``kind`` is how outcomes come of them."""

    seeds: float
    queries: float
    both: float
    kind: str = "mean"
    clusters: int = 0


CASES = {
    "seeds vary most": Case(1.0, 1.0, 0.5),
    "seeds and queries alike": Case(0.15, 1.0, 0.5),
    "queries vary most": Case(0.02, 1.0, 0.3),
    "interaction": Case(0.0, 0.1, 3.0),
    "interaction and seeds": Case(0.3, 0.1, 3.0),
    "0/1 outcomes, seeds": Case(1.0, 1.0, 0.5, "binary"),
    "0/1 outcomes, queries": Case(0.1, 1.5, 0.5, "binary"),
    "difference of trained systems": Case(0.3, 1.0, 1.0, "difference"),
    "trained against not trained": Case(0.3, 1.0, 0.5, "untrained"),
    "clusters": Case(0.1, 1.0, 0.5, clusters=20),
    "clusters, seeds": Case(0.5, 1.0, 0.5, clusters=20),
    "clusters, trained against not": Case(0.2, 1.0, 0.5, "untrained", clusters=20),
}


def run() -> dict[str, Any]:
    """Coverage and mean width (over the oracle's) of 95 % intervals, by case and number of seeds."""
    rows = [measured(name, seeds) for name in CASES for seeds in SEEDS]
    least = min(row["coverage"] for row in rows)
    return {
        "name": "coverage",
        "rows": rows,
        "least": least,
        "conditions": {"trials": TRIALS, "resamples": RESAMPLES, "queries": QUERIES, "level": LEVEL},
    }


def measured(name: str, seeds: int, *, trials: int = TRIALS, resamples: int = RESAMPLES) -> dict[str, Any]:
    """One row of the table."""
    case = CASES[name]
    rng = np.random.default_rng([seeds, *name.encode()])
    truth = expected(case)
    outcomes = [draw(case, seeds, rng) for _ in range(trials)]
    intervals = [interval(*outcome, resamples) for outcome in outcomes]
    before = np.array([crossed(*outcome, resamples) for outcome in outcomes])
    values = np.array([[one.value, one.low, one.high] for one in intervals])
    oracle = 2 * 1.96 * float(np.sqrt(np.mean((values[:, 0] - truth) ** 2)))
    return {
        "name": name,
        "seeds": seeds,
        "coverage": round(float(np.mean((values[:, 1] <= truth) & (truth <= values[:, 2]))), 4),
        "width": round(float(np.mean(values[:, 2] - values[:, 1])) / oracle, 3),
        "crossed_coverage": round(float(np.mean((before[:, 0] <= truth) & (truth <= before[:, 1]))), 4),
        "crossed_width": round(float(np.mean(before[:, 1] - before[:, 0])) / oracle, 3),
    }


Outcome = tuple[np.ndarray, np.ndarray | None, Labels | None]


def draw(case: Case, seeds: int, rng: np.random.Generator) -> Outcome:
    """Values f[S, Q] of one trial, the other system's where two are compared, and cluster labels."""
    labels = np.arange(QUERIES) % case.clusters if case.clusters else None
    first = _effects(case, seeds, rng, labels)
    if case.kind == "binary":
        return (rng.random(first.shape) < _sigmoid(first)).astype(np.float64), None, labels
    if case.kind == "mean":
        return first, None, labels
    shared = 2 * rng.normal(size=QUERIES)
    other = _effects(case, seeds, rng, labels) if case.kind == "difference" else np.zeros((1, QUERIES))
    return first + shared, other + shared, labels


def interval(a: np.ndarray, b: np.ndarray | None, labels: Labels | None, resamples: int) -> Measure:
    """The interval of the mean, or of the difference to ``b``."""
    if b is None:
        return mean_interval(a, resamples=resamples, clusters=labels)
    return paired_difference(a, b, resamples=resamples, clusters=labels)


def crossed(a: np.ndarray, b: np.ndarray | None, labels: Labels | None, resamples: int) -> np.ndarray:
    """Ends of the percentile bootstrap that draws queries and, independently, seeds."""
    values = a if b is None else a - b
    names: Labels = range(values.shape[1]) if labels is None else labels
    means = Resampler(names, resamples=resamples).means(values, names)[1:]
    return np.quantile((_seed_weights(len(values), resamples) * means).sum(1), QUANTILES)


def expected(case: Case) -> float:
    """The true value: 0, or the mean of sigmoid(N(0.5, total variance))."""
    if case.kind != "binary":
        return 0.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = np.sqrt(case.seeds**2 + case.queries**2 + case.both**2)
    return float(weights @ _sigmoid(0.5 + spread * nodes) / weights.sum())


def _effects(case: Case, seeds: int, rng: np.random.Generator, labels: np.ndarray | None) -> np.ndarray:
    """f64[S, Q]; queries of one cluster have most of their effect in common."""
    queries = case.queries * rng.normal(size=QUERIES)
    if labels is not None:
        queries = case.queries * rng.normal(size=case.clusters)[labels] + 0.3 * queries
    centre = 0.5 if case.kind == "binary" else 0.0
    return centre + case.seeds * rng.normal(size=(seeds, 1)) + queries + case.both * rng.normal(size=(seeds, QUERIES))


@functools.lru_cache(maxsize=4)
def _seed_weights(seeds: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seeds).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
