"""From paired per-query values to a claim with a verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobula.evaluation.intervals import RESAMPLES, paired_difference
from mobula.experiment import Claim, Verdict


def compare(
    name: str,
    statement: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    margin: float = 0.0,
    decisive: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Claim:
    """The claim that a exceeds b, on values f[Q] or f[S, Q] paired by query; the effect is the mean of a - b.

    With ``margin`` m > 0 the claim is that a is not worse than b by m or more. Where less is better (latency),
    pass the claimed winner as ``b``. ``decisive=False`` marks a run too small to decide.
    """
    difference = paired_difference(a, b, resamples=resamples, seed=seed)
    low, high = difference.low, difference.high
    decided = verdict(low, high, margin=margin, decisive=decisive)
    return Claim(name, statement, difference.value, low, high, difference.n, decided)


def always(name: str, statement: str, values: Sequence[float], *, least: float = 0.0, decisive: bool = True) -> Claim:
    """The claim that every one of some values exceeds ``least``; in place of an interval, the smallest and largest."""
    low, high = min(values), max(values)
    decided: Verdict = "holds" if low > least else "does_not_hold"
    return Claim(name, statement, float(np.mean(values)), low, high, len(values), decided if decisive else "undecided")


def verdict(low: float, high: float, *, margin: float = 0.0, decisive: bool = True) -> Verdict:
    """``holds`` if the whole interval lies above -margin, ``does_not_hold`` if below it, otherwise ``undecided``."""
    if not decisive:
        return "undecided"
    if low > -margin:
        return "holds"
    if high < -margin:
        return "does_not_hold"
    return "undecided"
