"""Trade-offs between objectives: the Pareto front, its hypervolume, and the best quality within a limit.

Points are rows of objective values; ``modes`` says for each column whether ``max`` or ``min`` is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def pareto_front(points: Sequence[Sequence[float]], modes: Sequence[str]) -> list[int]:
    """Indices, ascending, of the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one; equal points
    do not dominate each other.

    Raises:
        ValueError: for a mode other than max and min, a row of another length, or NaN.
    """
    costs = _costs(points, modes)
    return [i for i, row in enumerate(costs) if not _dominated(row, costs)]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float], modes: Sequence[str]) -> float:
    """Volume that the points dominate, bounded by ``reference`` (Zitzler and Thiele 1999).

    Points that are not better than the reference in every objective add nothing. Exact for any number of
    objectives, by slicing along the last one; meant for fronts of at most some hundred points.

    Raises:
        ValueError: as :func:`pareto_front`.
    """
    costs = _costs(points, modes)
    bound = _costs([reference], modes)[0]
    return _volume(costs[(costs < bound).all(axis=1)], bound)


def best_within(
    points: Sequence[Sequence[float]], quality: int, latency: int, limit: float, *, mode: str = "max"
) -> int | None:
    """Index of the best point by column ``quality`` among those whose column ``latency`` is at most ``limit``.

    Equal quality: the lower latency, then the earlier point. None if no point is within the limit.

    Raises:
        ValueError: if ``mode`` is neither max nor min.
    """
    sign = _signs([mode])[0]
    allowed = [i for i, row in enumerate(points) if row[latency] <= limit]
    return min(allowed, key=lambda i: (sign * points[i][quality], points[i][latency]), default=None)


def _signs(modes: Sequence[str]) -> Matrix:
    wrong = [mode for mode in modes if mode not in ("max", "min")]
    if wrong:
        raise ValueError(f"mode {wrong[0]!r}: expected max or min")
    return np.array([-1.0 if mode == "max" else 1.0 for mode in modes])


def _costs(points: Sequence[Sequence[float]], modes: Sequence[str]) -> Matrix:
    """f64[N, M], lower is better in every column."""
    signs = _signs(modes)
    costs = np.array([list(row) for row in points], dtype=np.float64).reshape(len(points), len(modes)) * signs
    if np.isnan(costs).any():
        raise ValueError("an objective is NaN; such a point has no place on a front")
    return costs


def _dominated(row: Matrix, costs: Matrix) -> bool:
    return bool(((costs <= row).all(axis=1) & (costs < row).any(axis=1)).any())


def _volume(costs: Matrix, bound: Matrix) -> float:
    if len(costs) == 0:
        return 0.0
    if costs.shape[1] == 1:
        return float(bound[0] - costs[:, 0].min())
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    upper = np.append(costs[1:, -1], bound[-1])
    slices = ((high - low, n) for n, (low, high) in enumerate(zip(costs[:, -1], upper, strict=True), start=1))
    return float(sum(depth * _volume(costs[:n, :-1], bound[:-1]) for depth, n in slices if depth > 0))
