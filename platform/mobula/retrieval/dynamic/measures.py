"""Measures of retrieval over sessions, and the clusters that their intervals draw.

Shapes: T = n + 1 states of the corpus and as many sessions. P[t, i] is the mean over the rows of session
i searched in the documents of sessions 0..t, i <= t; cells above the diagonal are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mobula.data.duplicates import components
from mobula.data.sessions import SessionRow

Statistic = Callable[[np.ndarray], np.ndarray]


def generalisation(p: np.ndarray) -> np.ndarray:
    """GA_n = mean over i >= 1 of P[i, i], of P[..., T, T]; the same number is FWT_n where nothing is retrained."""
    return np.diagonal(p, axis1=-2, axis2=-1)[..., 1:].mean(-1)


def forgetting(p: np.ndarray) -> np.ndarray:
    """F_n = max over t < n of P[t, 0], minus P[n, 0]; lower is better, and it may be negative."""
    return p[..., :-1, 0].max(-1) - p[..., -1, 0]


def average(p: np.ndarray) -> np.ndarray:
    """AP_n = mean over all sessions of P[n, i]."""
    return p[..., -1, :].mean(-1)


def backward(p: np.ndarray) -> np.ndarray:
    """BWT_n = mean over i < n of (max over i <= t <= n of P[t, i], minus P[n, i]); lower is better, never negative."""
    return (np.fmax.reduce(p, axis=-2) - p[..., -1, :])[..., :-1].mean(-1)


def initial(p: np.ndarray) -> np.ndarray:
    """P[0, 0]: the initial documents alone."""
    return p[..., 0, 0]


def spread(p: np.ndarray) -> np.ndarray:
    """Largest minus smallest P[t, t]."""
    diagonal = np.diagonal(p, axis1=-2, axis2=-1)
    return diagonal.max(-1) - diagonal.min(-1)


def arriving(diagonal: np.ndarray) -> np.ndarray:
    """Mean over sessions 1..n of a fact of the diagonal f64[..., T]."""
    return diagonal[..., 1:].mean(-1)


STATISTICS: dict[str, Statistic] = {
    "P[0,0]": initial,
    "GA": generalisation,
    "F": forgetting,
    "AP": average,
    "BWT": backward,
}


def clusters(rows: Sequence[Sequence[SessionRow]]) -> list[list[int]]:
    """The cluster of every row, session by session: what a bootstrap draws together."""
    # A query asked in several sessions is one draw from the population of queries, and rows with the same relevant
    # documents share these documents' difficulty; both bind, so clusters are the connected components. Single shared
    # documents do not bind: on CACM they would chain 195 of 230 rows into one cluster.
    flat = [row for session in rows for row in session]
    first: dict[object, int] = {}
    pairs = [
        (first.setdefault(key, index), index)
        for index, row in enumerate(flat)
        for key in (("query", row.query.id), ("gold", frozenset(row.query.gold)))
    ]
    label_of = {row: label for label, members in enumerate(components(len(flat), pairs)) for row in members}
    labels = iter(range(len(flat)))
    return [[label_of[next(labels)] for _ in session] for session in rows]


def means(values: Sequence[np.ndarray]) -> np.ndarray:
    """P f64[T, T] from ``values[i]`` f64[S, T, rows of session i]."""
    return np.stack([session.mean((0, 2)) for session in values], axis=-1)
