"""The checkable claims of DiffuGR (spec, section 10b) on the outcomes of a test split.

Each claim names the systems it compares; the effect is a paired mean difference over queries (and seeds).
A claim whose systems were not measured is left out of the report, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mobula.evaluation.claims import compare
from mobula.experiment import Claim
from mobula.retrieval.outcomes import Outcome, Split

COMPETITIVE_MARGIN = 0.02  # "competitive": not worse by two points or more


@dataclass(frozen=True)
class Comparison:
    """``better`` exceeds ``worse`` on a measure, paired by query."""

    name: str
    statement: str
    better: str
    worse: str
    measure: str | None = None
    margin: float = 0.0


def quality_claims(
    split: Split, comparisons: list[Comparison], *, primary: str, decisive: bool, resamples: int
) -> Iterator[Claim]:
    """Claims about ranking quality."""
    for comparison in comparisons:
        better, worse = split.outcomes.get(comparison.better), split.outcomes.get(comparison.worse)
        measure = comparison.measure or primary
        if better is None or worse is None or measure not in better.values or measure not in worse.values:
            continue
        yield compare(
            comparison.name,
            f"{comparison.statement} ({comparison.better} against {comparison.worse}, {measure})",
            better.per_query(measure),
            worse.per_query(measure),
            margin=comparison.margin,
            decisive=decisive,
            resamples=resamples,
        )


def comparisons(main: str, twin: str | None, random: str | None, steps: list[int], chosen: str) -> list[Comparison]:
    """The comparisons of claims A, E, F and G. ``chosen`` is the diffusion system that dev prefers."""
    low, high = min(steps), max(steps)
    rows = [
        Comparison(
            "A-rerank",
            "quality rises with denoising steps",
            f"{main} match_rerank T={high}",
            f"{main} match_rerank T={low}",
        ),
        Comparison("A-match", "quality rises with denoising steps", f"{main} match T={high}", f"{main} match T={low}"),
        Comparison(
            "F-rerank", "denoising adds to one forward pass", f"{main} match_rerank T={high}", f"{main} one_pass"
        ),
        Comparison("F-beam", "denoising adds to one forward pass", f"{main} beam", f"{main} one_pass"),
        Comparison("F-best_of_n", "denoising adds to one forward pass", f"{main} best_of_n", f"{main} one_pass"),
        Comparison("F-chain", "denoising adds to one forward pass", f"{main} chain_rescore", f"{main} one_pass"),
        Comparison("G-hamming", "the model adds to the quantised encoder", chosen, "hamming"),
        Comparison("G-adc", "the model adds to the quantised encoder's own distances", chosen, "adc"),
    ]
    if random is not None:
        rows.append(
            Comparison("G-random", "semantic codes beat random codes", f"{main} one_pass", f"{random} one_pass")
        )
    if twin is not None:
        for reference in ("beam 100", "exhaustive"):
            name = f"{twin} {reference}"
            rows.append(Comparison(f"E-outperforms {reference}", "diffusion outperforms its twin", chosen, name))
            rows.append(
                Comparison(
                    f"E-competitive {reference}",
                    f"diffusion is competitive with its twin (within {COMPETITIVE_MARGIN:.0%})",
                    chosen,
                    name,
                    margin=COMPETITIVE_MARGIN,
                )
            )
    return rows


def threshold_claim(
    split: Split, main: str, steps: list[int], thresholds: list[float], *, primary: str, decisive: bool, resamples: int
) -> Claim | None:
    """Claim B: at the same mean number of steps, a confidence threshold beats a fixed budget.

    The fixed budget's quality at a fractional number of steps is interpolated between its neighbours, per
    query; the effect is the mean over thresholds that fall inside the measured budgets.
    """
    fixed = {t: split.outcomes.get(f"{main} match T={t}") for t in sorted(steps)}
    if any(outcome is None for outcome in fixed.values()):
        return None
    ours, theirs = [], []
    for tau in thresholds:
        outcome = split.outcomes.get(f"{main} match tau={tau:g}")
        spent = outcome.fact("steps") if outcome else None
        if outcome is None or spent is None or not min(steps) <= spent <= max(steps):
            continue
        ours.append(outcome.per_query(primary))
        theirs.append(_interpolated(fixed, spent, primary))  # type: ignore[arg-type]
    if not ours:
        return None
    return compare(
        "B-threshold",
        f"a confidence threshold gives a better frontier than a fixed number of steps (match, {primary})",
        np.mean(ours, 0),
        np.mean(theirs, 0),
        decisive=decisive,
        resamples=resamples,
    )


def latency_claim(
    split: Split, name: str, ours: str, theirs: str, statement: str, *, decisive: bool, resamples: int
) -> Claim | None:
    """Claim C: the effect is the mean of log(twin's ms / ours) over queries timed in turns (0: equal)."""
    a, b = split.outcomes.get(theirs), split.outcomes.get(ours)
    if a is None or b is None or not len(a.ms) or not len(b.ms):
        return None
    return compare(
        name,
        f"{statement} ({ours} against {theirs}; effect is the mean log ratio of ms)",
        np.log(a.ms),
        np.log(b.ms),
        decisive=decisive,
        resamples=resamples,
    )


def _interpolated(fixed: dict[int, Outcome], steps: float, measure: str) -> np.ndarray:
    known = sorted(fixed)
    below = max(t for t in known if t <= steps)
    above = min(t for t in known if t >= steps)
    share = 0.0 if above == below else (steps - below) / (above - below)
    return (1 - share) * fixed[below].per_query(measure) + share * fixed[above].per_query(measure)
