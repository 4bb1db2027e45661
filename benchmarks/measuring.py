"""What the benchmarks share: ratios of paired times, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of the pairs' ratios ours/theirs, with a 95 % bootstrap interval over pairs."""
    pairs = np.asarray(ours) / np.asarray(theirs)
    draws = np.random.default_rng(0).choice(pairs, (RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"value": round(float(np.median(pairs)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
