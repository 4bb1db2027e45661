"""Measures of retrieval over sessions, and their intervals.

Shapes: T = n + 1 states of the corpus and as many sessions, R resamples. P[t, i] is the mean over the rows of session
i searched in the documents of sessions 0..t, i <= t; cells above the diagonal are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mobula.evaluation.claims import verdict
from mobula.experiment import Claim, Measure

Statistic = Callable[[np.ndarray], np.ndarray]
QUANTILES = (0.025, 0.975)


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
    return (np.nanmax(p, axis=-2) - p[..., -1, :])[..., :-1].mean(-1)


def initial(p: np.ndarray) -> np.ndarray:
    """P[0, 0]: the initial documents alone."""
    return p[..., 0, 0]


def spread(p: np.ndarray) -> np.ndarray:
    """Largest minus smallest P[t, t]."""
    diagonal = np.diagonal(p, axis1=-2, axis2=-1)
    return diagonal.max(-1) - diagonal.min(-1)


STATISTICS: dict[str, Statistic] = {
    "P[0,0]": initial,
    "GA": generalisation,
    "F": forgetting,
    "AP": average,
    "BWT": backward,
}


@dataclass
class Cells:
    """What one system, trained with S seeds (1 if not at all), did.

    ``values[measure][i]`` f64[S, T, rows of session i], NaN where t < i. ``diagonal[name][i]`` f64[S, rows of session
    i] are facts of session i's rows searched at state i: the share of initial documents in the top ten, the hit with
    decoding restricted to the session's documents.
    """

    values: dict[str, list[np.ndarray]]
    diagonal: dict[str, list[np.ndarray]]
    filled: float = 0.0


class Resampler:
    """A bootstrap over rows that all systems share, so that differences are paired.

    Rows with the same gold are one cluster and are drawn together; sessions are drawn apart from each other. Training
    seeds are drawn as well, independently of rows.
    """

    def __init__(self, clusters: Sequence[Sequence[object]], resamples: int, seed: int = 0) -> None:
        """``clusters`` names the cluster of every row, session by session."""
        random = np.random.default_rng(seed)
        self.resamples = resamples
        self._members: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        for names in clusters:
            place = {name: i for i, name in enumerate(dict.fromkeys(names))}
            members = np.zeros((len(place), len(names)))
            for row, name in enumerate(names):
                members[place[name], row] = 1.0
            share = np.full(len(place), 1 / len(place))
            self._members.append(members)
            self._counts.append(random.multinomial(len(place), share, size=resamples).astype(np.float64))
        self._seeds: dict[int, np.ndarray] = {}

    def cells(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Resampled P f64[R, T, T] from ``values[i]`` f64[S, T, rows of session i]."""
        return np.stack([self._session(i, found) for i, found in enumerate(values)], axis=-1)

    def diagonal(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Resampled means f64[R, T] from ``values[i]`` f64[S, rows of session i]."""
        return np.stack([self._session(i, found[:, None])[:, 0] for i, found in enumerate(values)], axis=-1)

    def _session(self, i: int, values: np.ndarray) -> np.ndarray:
        """f64[R, T] from f64[S, T, rows]: rows and seeds drawn with replacement."""
        members, counts = self._members[i], self._counts[i]
        sizes = counts @ members.sum(1)
        per_seed = np.stack([counts @ (members @ one.T) / sizes[:, None] for one in values])
        return np.einsum("rs,srt->rt", self._weights(len(values)), per_seed)

    def _weights(self, seeds: int) -> np.ndarray:
        """Weight f64[R, S] of every seed in every resample."""
        if seeds not in self._seeds:
            drawn = np.random.default_rng(seeds).multinomial(seeds, np.full(seeds, 1 / seeds), size=self.resamples)
            self._seeds[seeds] = drawn / seeds
        return self._seeds[seeds]


def means(values: Sequence[np.ndarray]) -> np.ndarray:
    """P f64[T, T] from ``values[i]`` f64[S, T, rows of session i]."""
    return np.stack([found.mean((0, 2)) for found in values], axis=-1)


def diagonal_means(values: Sequence[np.ndarray]) -> np.ndarray:
    """f64[T] from ``values[i]`` f64[S, rows of session i]."""
    return np.array([found.mean() for found in values])


def interval(value: float, resampled: np.ndarray, rows: int) -> Measure:
    """A statistic with its 95 % percentile interval."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, QUANTILES) if len(known) else (np.nan, np.nan)
    return Measure(float(value), float(low), float(high), rows)


def claim(name: str, statement: str, effect: Measure, *, margin: float = 0.0, decisive: bool = True) -> Claim:
    """The claim that an effect is above ``-margin``."""
    decided = verdict(effect.low, effect.high, margin=margin, decisive=decisive)
    return Claim(name, statement, effect.value, effect.low, effect.high, effect.n, decided)
