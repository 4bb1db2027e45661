"""Bootstrap intervals over queries, and over seeds where a system was trained more than once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mobula.errors import MobulaError
from mobula.experiment import Measure

RESAMPLES = 10_000
LEVEL = 0.95
# Resampled positions held at a time: 4M of them are 32 MB.
_BLOCK = 4_000_000


def mean_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Measure:
    """Mean of values f[Q], or f[S, Q] of S seeds, with its 95 % percentile interval.

    Queries are resampled with replacement and, independently, so are seeds (a crossed bootstrap); n is Q.

    Raises:
        MobulaError: if there are no values or one of them is not finite.
    """
    table = _table(values)
    means = np.concatenate(list(_resampled_means(table, resamples, np.random.default_rng(seed))))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measure(float(table.mean()), float(low), float(high), table.shape[1])


def paired_difference(a: np.ndarray, b: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Measure:
    """Mean of a - b over the same queries (and seeds) with its 95 % interval.

    Arrays are f[Q] or f[S, Q]. A system without seeds is compared with every seed of the other one.

    Raises:
        MobulaError: if the shapes do not match.
    """
    left, right = _table(a), _table(b)
    if left.shape[1] != right.shape[1] or (left.shape[0] != right.shape[0] and 1 not in (len(left), len(right))):
        raise MobulaError(f"paired comparison of shapes {left.shape} and {right.shape}; queries and seeds must match")
    return mean_interval(left - right, resamples=resamples, seed=seed)


def _table(values: np.ndarray) -> np.ndarray:
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MobulaError(f"an interval needs finite values of shape [Q] or [S, Q], found shape {np.shape(values)}")
    return table


def _resampled_means(table: np.ndarray, resamples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    seeds, queries = table.shape
    block = max(1, _BLOCK // queries)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        chosen = random.integers(0, queries, size=(rows, queries))
        if seeds == 1:
            yield table[0][chosen].mean(1)
            continue
        weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=rows) / seeds
        per_seed = np.stack([row[chosen].mean(1) for row in table], axis=1)
        yield (weights * per_seed).sum(1)
