"""Confidence intervals over queries, and over seeds where a system was trained more than once.

Over queries: the percentile bootstrap; queries that share a label are one cluster and are drawn together. Over seeds,
of which there are few: a t-interval of the seeds' jackknife values. The two are combined by adding squared half-widths
(Graybill and Wang, 1980; "MOVER": Zou and Donner, 2008), which needs no estimate of degrees of freedom:

    half^2 = max(t[S-1]^2 v_seeds + (1 - v_both / v_queries) d^2, d^2)

v_seeds is the variance of the mean over S seeds, d the distance from the value to the bootstrap's quantile (scaled by
t[C-1] / z and sqrt(C / (C-1)) for C clusters), v_queries the bootstrap's variance and v_both the part of it that is
query-by-seed interaction, which v_seeds has already. `mobula benchmark coverage` measures what it covers.

Shapes: R resamples, S seeds, Q queries or rows, C clusters. Row 0 of a table of R + 1 rows is the sample itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from mobula.errors import MobulaError
from mobula.experiment import Measure

RESAMPLES = 10_000
LEVEL = 0.95
# Resampled positions held at a time: 4M of them are 32 MB.
_BLOCK = 4_000_000
# A statistic that most resamples do not have (an empty session, a level out of reach) has no interval.
_LEAST_KNOWN = 0.5

Statistic = Callable[..., np.ndarray]
Labels = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A statistic with what its interval at any level needs.

    ``resampled`` f64[R] are its values over resampled clusters, ascending; ``seeds`` its values seed by seed.
    ``seed_variance`` is the variance of its mean over seeds, ``apart`` the share of the clusters' variance that is no
    interaction with seeds.
    """

    value: float
    resampled: np.ndarray
    clusters: int
    n: int
    seeds: tuple[float, ...] = ()
    seed_variance: float = 0.0
    cluster_share: float = 1.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Lower and upper end; the percentile interval of the bootstrap where there is one seed."""
        if not len(self.resampled):
            return float("nan"), float("nan")
        # The ends of a sorted array, without sorting it again.
        at = (len(self.resampled) - 1) * np.array([(1 - level) / 2, (1 + level) / 2])
        low, high = np.interp(at, np.arange(len(self.resampled)), self.resampled)
        if len(self.seeds) < 2:
            return float(low), float(high)
        scale, t = _small_sample(self.clusters, level), _t(len(self.seeds) - 1, level)
        distances = scale * np.maximum([self.value - low, high - self.value], 0.0)
        squares = np.maximum(t**2 * self.seed_variance + self.cluster_share * distances**2, distances**2)
        below, above = np.sqrt(squares)
        return float(self.value - below), float(self.value + above)

    def p(self, null: float = 0.0) -> float:
        """Two-sided p-value: the smallest 1 - level at which the interval leaves ``null`` out, at least 2 / (R + 1)."""
        least, most = 2 / (len(self.resampled) + 1), 1.0
        if not self._leaves_out(null, most):
            return 1.0
        if self._leaves_out(null, least):
            return least
        for _ in range(40):
            middle = (least + most) / 2
            least, most = (least, middle) if self._leaves_out(null, middle) else (middle, most)
        return most

    def measure(self) -> Measure:
        """The value with its 95 % interval; values by seed where there are several."""
        low, high = self.interval()
        return Measure(self.value, low, high, self.n, list(self.seeds) if len(self.seeds) > 1 else None)

    def _leaves_out(self, null: float, alpha: float) -> bool:
        low, high = self.interval(1 - alpha)
        return low > null or high < null


class Resampler:
    """A bootstrap over clusters of rows that all systems share, so that what is computed from its tables is paired.

    :meth:`means` makes a table of resampled means by seed, of any number of cells; :meth:`estimate` takes a statistic
    of such tables: a mean, a difference or a ratio of two systems, a value read off a curve.
    """

    def __init__(self, labels: Labels, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        """``labels`` name the clusters; where one occurs again it is the same cluster."""
        self._index = {label: index for index, label in enumerate(dict.fromkeys(_hashable(labels)))}
        self.clusters = len(self._index)
        self._drawn = (self.clusters, resamples, seed)

    def weights(self, labels: Labels) -> np.ndarray:
        """How often every row was drawn, f64[R + 1, rows], for statistics that are no function of means."""
        return _counts(*self._drawn)[:, self._positions(labels)].astype(np.float64)

    def means(self, values: np.ndarray, labels: Labels) -> np.ndarray:
        """Resampled means over rows f64[R + 1, S, ...] of ``values`` f[S, ..., rows], whose clusters ``labels`` name.

        NaN where a resample has none of the rows.
        """
        positions = self._positions(labels)
        rows = values.reshape(-1, len(positions)).T
        sums = np.zeros((self.clusters, rows.shape[1]))
        np.add.at(sums, positions, rows)
        sizes = np.bincount(positions, minlength=self.clusters).astype(np.float64)
        columns = np.column_stack([sums, sizes])
        counts = _counts(*self._drawn)
        block = max(1, _BLOCK // self.clusters)
        totals = np.concatenate([counts[i : i + block] @ columns for i in range(0, len(counts), block)])
        with np.errstate(invalid="ignore"):
            return (totals[:, :-1] / totals[:, -1:]).reshape(len(counts), *values.shape[:-1])

    def estimate(self, statistic: Statistic, *tables: np.ndarray, n: int | None = None) -> Estimate:
        """A statistic of tables f64[R + 1, S, ...]; a table of one seed goes with every seed of the others.

        ``statistic`` maps f64[N, ...] per table (the mean over seeds) to f64[N]. Over seeds it is jackknifed, so it
        need not be linear. ``n`` is what the report shows (the number of clusters unless given).

        Raises:
            MobulaError: if tables have different numbers of seeds.
        """
        count = max(table.shape[1] for table in tables)
        if any(table.shape[1] not in (1, count) for table in tables):
            raise MobulaError(f"tables of {[table.shape[1] for table in tables]} seeds; seeds must match")
        n = self.clusters if n is None else n
        whole = statistic(*(table.mean(1) for table in tables))
        if count == 1:
            return Estimate(float(whole[0]), _known(whole[1:]), self.clusters, n)
        without = np.stack([statistic(*(_without(table, s) for table in tables)) for s in range(count)])
        pseudo = count * whole - (count - 1) * without
        known = np.isfinite(pseudo).all(0)
        # What resampling queries changes in one seed and not in the others.
        moved = (pseudo - pseudo[:, :1])[:, 1:][:, known[1:]]
        both = moved.var(0, ddof=1).mean() / count if moved.size else 0.0
        queries = whole[1:][known[1:]].var() if moved.size else 0.0
        return Estimate(
            float(whole[0]),
            _known(np.where(known, whole, np.nan)[1:]),
            self.clusters,
            n,
            tuple(float(statistic(*(_one(table, s)[:1] for table in tables))[0]) for s in range(count)),
            float(pseudo[:, 0].var(ddof=1) / count),
            float(np.clip(1 - both / queries, 0, 1)) if queries > 0 else 1.0,
        )

    def _positions(self, labels: Labels) -> np.ndarray:
        return np.array([self._index[label] for label in _hashable(labels)], dtype=np.intp)


def mean_interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, clusters: Labels | None = None
) -> Measure:
    """Mean of values f[Q], or f[S, Q] of S seeds, with its 95 % interval.

    ``clusters`` names the cluster of every query (its own unless given). n is Q; ``seeds`` are the seeds' means.

    Raises:
        MobulaError: if there are no values, one of them is not finite, or the labels are not as many as queries.
    """
    return mean_estimate(values, resamples=resamples, seed=seed, clusters=clusters).measure()


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, clusters: Labels | None = None
) -> Measure:
    """Mean of a - b over the same queries (and seeds) with its 95 % interval.

    Arrays are f[Q] or f[S, Q]. A system without seeds is compared with every seed of the other one.

    Raises:
        MobulaError: if the shapes do not match.
    """
    return difference_estimate(a, b, resamples=resamples, seed=seed, clusters=clusters).measure()


def mean_estimate(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, clusters: Labels | None = None
) -> Estimate:
    """As :func:`mean_interval`, with intervals at any level and p-values."""
    table = _table(values)
    labels = range(table.shape[1]) if clusters is None else clusters
    if len(labels) != table.shape[1]:
        raise MobulaError(f"{len(labels)} cluster labels for {table.shape[1]} queries")
    resampler = Resampler(labels, resamples=resamples, seed=seed)
    return resampler.estimate(np.asarray, resampler.means(table, labels), n=table.shape[1])


def difference_estimate(
    a: np.ndarray, b: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, clusters: Labels | None = None
) -> Estimate:
    """As :func:`paired_difference`, with intervals at any level and p-values."""
    left, right = _table(a), _table(b)
    if left.shape[1] != right.shape[1] or (left.shape[0] != right.shape[0] and 1 not in (len(left), len(right))):
        raise MobulaError(f"paired comparison of shapes {left.shape} and {right.shape}; queries and seeds must match")
    return mean_estimate(left - right, resamples=resamples, seed=seed, clusters=clusters)


def matched_level(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    *,
    level: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Labels | None = None,
) -> Estimate:
    """Difference a - b in y at a level of x that both curves reach, interpolated inside every resample.

    A curve is (x, y), each f[S, K, Q]: K points, e.g. network calls and quality at K budgets, or quality on old and
    on new tasks after K updates. ``level`` is the highest x that both reach in the resample, unless given.
    """
    curves = [np.asarray(values, dtype=np.float64) for values in (*a, *b)]
    rows = curves[0].shape[-1]
    labels = range(rows) if clusters is None else clusters
    if any(values.ndim != 3 or values.shape[-1] != rows for values in curves) or len(labels) != rows:
        raise MobulaError(f"curves of shapes {[values.shape for values in curves]}, {len(labels)} labels: [S, K, Q]")
    resampler = Resampler(labels, resamples=resamples, seed=seed)

    def difference(ax: np.ndarray, ay: np.ndarray, bx: np.ndarray, by: np.ndarray) -> np.ndarray:
        common = np.minimum(ax.max(-1), bx.max(-1)) if level is None else np.full(len(ax), level)
        return interpolate(ax, ay, common) - interpolate(bx, by, common)

    return resampler.estimate(difference, *(resampler.means(values, labels) for values in curves), n=rows)


def interpolate(x: np.ndarray, y: np.ndarray, level: np.ndarray) -> np.ndarray:
    """y f[N] at x = ``level`` f[N], linear between the points f[N, K] of a curve in order of x; NaN outside of it."""
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    right = np.clip((x < level[:, None]).sum(-1), 1 if x.shape[-1] > 1 else 0, x.shape[-1] - 1)
    left, row = np.maximum(right - 1, 0), np.arange(len(x))
    width = x[row, right] - x[row, left]
    share = np.divide(level - x[row, left], width, out=np.ones(len(x)), where=width > 0)
    inside = (x[:, 0] <= level) & (level <= x[:, -1])
    return np.where(inside, (1 - share) * y[row, left] + share * y[row, right], np.nan)


def hierarchical_interval(
    groups: Sequence[Sequence[float] | np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> Measure:
    """Mean over groups of the means within, when groups (seeds, worlds) do not share their units.

    The hierarchical bootstrap: groups are drawn, then units within each; distances to its quantiles are scaled by
    t[G-1] / z and sqrt(G / (G-1)) for few groups G. n is the number of units.

    Raises:
        MobulaError: if a group is empty or has values that are not finite.
    """
    tables = [_table(np.asarray(group))[0] for group in groups]
    means = np.array([table.mean() for table in tables])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=resamples)
    total = np.zeros(resamples)
    for times, table in zip(draws.T, tables, strict=True):
        for repeat in range(times.max()):
            kept = np.flatnonzero(times > repeat)
            total[kept] += table[rng.integers(0, len(table), size=(len(kept), len(table)))].mean(1)
    value = float(means.mean())
    low, high = np.quantile(total / len(tables), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    scale = _small_sample(len(tables), LEVEL)
    ends = float(value - scale * (value - low)), float(value + scale * (high - value))
    return Measure(value, *ends, sum(map(len, tables)), means.tolist() if len(tables) > 1 else None)


def wilson(successes: float, n: int) -> Measure:
    """A proportion with its 95 % Wilson score interval, which does not collapse at 0 of n and n of n.

    Raises:
        MobulaError: unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise MobulaError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    z2 = float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Measure(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n)


def _table(values: np.ndarray) -> np.ndarray:
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MobulaError(f"an interval needs finite values of shape [Q] or [S, Q], found shape {np.shape(values)}")
    return table


# A report asks for the same draws again and again.
@lru_cache(maxsize=2)
def _counts(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn, u16[R + 1, C]; the first row is the sample itself."""
    rng = np.random.default_rng(seed)
    counts = np.ones((resamples + 1, clusters), dtype=np.uint16)
    block = max(1, _BLOCK // clusters)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(0, clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts[1 + start : 1 + start + rows] = np.bincount(draws.ravel(), minlength=rows * clusters).reshape(rows, -1)
    counts.flags.writeable = False
    return counts


def _hashable(labels: Labels) -> list[Hashable]:
    return labels.tolist() if isinstance(labels, np.ndarray) else list(labels)


def _known(resampled: np.ndarray) -> np.ndarray:
    known = np.sort(resampled[np.isfinite(resampled)])
    return known if len(known) >= _LEAST_KNOWN * len(resampled) else known[:0]


def _one(table: np.ndarray, seed: int) -> np.ndarray:
    return table[:, seed if table.shape[1] > 1 else 0]


def _without(table: np.ndarray, seed: int) -> np.ndarray:
    """Mean over the other seeds."""
    return (table.sum(1) - table[:, seed]) / (table.shape[1] - 1) if table.shape[1] > 1 else table[:, 0]


@lru_cache(maxsize=4096)
def _t(degrees: int, level: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, degrees))


def _small_sample(units: int, level: float) -> float:
    """What widens a percentile interval of few units to a t-interval."""
    if units < 2 or level <= 0:
        return 1.0
    return _t(units - 1, level) / float(stats.norm.ppf((1 + level) / 2)) * float(np.sqrt(units / (units - 1)))
