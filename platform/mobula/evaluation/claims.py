"""From paired per-query values to a claim with a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mobula.errors import MobulaError
from mobula.evaluation.intervals import LEVEL, RESAMPLES, Estimate, Labels, difference_estimate
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
    clusters: Labels | None = None,
) -> Claim:
    """The claim that a exceeds b, on values f[Q] or f[S, Q] paired by query; the effect is the mean of a - b.

    With ``margin`` m > 0 the claim is that a is not worse than b by m or more. Where less is better (latency),
    pass the claimed winner as ``b``. ``decisive=False`` marks a run too small to decide. ``clusters`` names the
    cluster of every query.
    """
    effect = difference_estimate(a, b, resamples=resamples, seed=seed, clusters=clusters)
    return exceeds(name, statement, effect, margin=margin, decisive=decisive)


def exceeds(name: str, statement: str, effect: Estimate, *, margin: float = 0.0, decisive: bool = True) -> Claim:
    """The claim that an effect, of any statistic, lies above ``-margin``."""
    low, high = effect.interval()
    decided = verdict(low, high, margin=margin, decisive=decisive)
    return Claim(name, statement, effect.value, low, high, effect.n, decided, effect.p(-margin))


def equivalent(
    name: str,
    statement: str,
    a: np.ndarray,
    b: np.ndarray,
    margin: float,
    *,
    decisive: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Labels | None = None,
) -> Claim:
    """The claim that a and b differ by less than ``margin`` > 0: two one-sided tests (TOST) at 2.5 % each.

    It holds if the 95 % interval of the mean of a - b, the one a report shows, lies within +-margin, and does not hold
    if the interval lies outside. (The customary 5 % each would be the 90 % interval.)

    Raises:
        MobulaError: if the margin is not positive.
    """
    if not margin > 0:
        raise MobulaError(f"{name}: equivalence needs a margin > 0, found {margin}")
    effect = difference_estimate(a, b, resamples=resamples, seed=seed, clusters=clusters)
    low, high = effect.interval()
    decided: Verdict = "undecided"
    if decisive and -margin < low and high < margin:
        decided = "holds"
    elif decisive and (low > margin or high < -margin):
        decided = "does_not_hold"
    p = max(effect.p(-margin), effect.p(margin))
    return Claim(name, statement, effect.value, low, high, effect.n, decided, p)


def holm(claims: Sequence[Claim]) -> list[Claim]:
    """Holm's step-down over a family of claims: p becomes the adjusted p, and a verdict that does not survive at 5 %
    becomes ``undecided``. Effects and intervals stay those of the single comparisons.

    Raises:
        MobulaError: if a claim has no p-value.
    """
    if missing := [claim.name for claim in claims if claim.p is None]:
        raise MobulaError(f"Holm's correction needs p-values; {', '.join(missing)} have none")
    adjusted, least = list(claims), 0.0
    order = sorted(range(len(claims)), key=lambda i: claims[i].p or 0.0)
    for rank, i in enumerate(order):
        claim = claims[i]
        least = max(least, min(1.0, (len(claims) - rank) * (claim.p or 0.0)))
        # An interval that excludes the null by a hair has p = 5 % up to rounding.
        survives = least <= 1 - LEVEL + 1e-9
        adjusted[i] = replace(claim, p=least, verdict=claim.verdict if survives else "undecided")
    return adjusted


def holm_by_statement(claims: Iterable[Claim]) -> list[Claim]:
    """:func:`holm` within every family of claims whose names begin with the same word, such as ``F1 a b`` and ``F1 c``.

    They speak for one statement of several systems. Claims without a p-value are left as they are.
    """
    corrected = list(claims)
    families: dict[str, list[int]] = {}
    for i, claim in enumerate(corrected):
        if claim.p is not None:
            families.setdefault(claim.name.split()[0], []).append(i)
    for positions in families.values():
        for i, adjusted in zip(positions, holm([corrected[i] for i in positions]), strict=True):
            corrected[i] = adjusted
    return corrected


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
