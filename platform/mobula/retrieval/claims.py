"""The checkable claims of DiffuGR (spec, section 10b) on the outcomes of a test split.

Each claim compares systems by value; the effect is a paired mean difference over queries (and seeds). A claim is left
out only where the experiment says that a system of it is not evaluated; a system that should have been evaluated and
was not is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mobula.evaluation.claims import compare, holm_by_statement
from mobula.experiment import Claim
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import Recovery
from mobula.retrieval.results import Outcome, Split
from mobula.retrieval.systems import Decoded, budgets, decoded
from mobula.study import System

COMPETITIVE_MARGIN = 0.02  # "competitive": not worse by two points or more
HAMMING, ADC = System("hamming"), System("adc")
RECOVERY_BEAM = 10  # width of the twin's beam that early errors are forced in


@dataclass(frozen=True)
class Comparison:
    """``better`` exceeds ``worse`` on the primary measure, paired by query; ``when``: both are evaluated."""

    name: str
    statement: str
    better: System
    worse: System
    when: bool = True
    margin: float = 0.0


@dataclass(frozen=True)
class Claims:
    """The claims of a run. ``chosen`` is the diffusion system that dev prefers; ``recovered`` holds a value a seed."""

    config: Config
    test: Split
    chosen: Decoded
    recovered: Mapping[Decoded, Sequence[Recovery]]

    def all(self) -> Iterator[Claim]:
        """Every claim that the experiment has the systems for, A to G; Holm's correction within a statement."""
        yield from holm_by_statement([*self._quality(), *self._threshold(), *self._latency(), *self._recovery()])

    def comparisons(self) -> Iterator[Comparison]:
        """Claims A, F, G and E, which compare ranking quality."""
        yield from self._denoising()
        yield from self._semantics()
        yield from self._twin()

    def _denoising(self) -> Iterator[Comparison]:
        main, steps, swept = self.config.main, budgets(self.config), self.config.evaluation.decoders
        rerank, match = "match_rerank" in swept, "match" in swept
        rises, adds = "quality rises with denoising steps", "denoising adds to one forward pass"

        def at(decoder: str, budget: int) -> Decoded:
            return decoded(main, decoder=decoder, steps=budget)

        yield Comparison("A-rerank", rises, at("match_rerank", steps[-1]), at("match_rerank", steps[0]), rerank)
        yield Comparison("A-match", rises, at("match", steps[-1]), at("match", steps[0]), match)
        one_pass = decoded(main, decoder="one_pass")
        yield Comparison("F-rerank", adds, at("match_rerank", steps[-1]), one_pass, rerank)
        for name, decoder in (("F-beam", "beam"), ("F-best_of_n", "best_of_n"), ("F-chain", "chain_rescore")):
            yield Comparison(name, adds, decoded(main, decoder=decoder), one_pass)

    def _semantics(self) -> Iterator[Comparison]:
        main, random, code_only = self.config.main, self.config.random, self.config.main.docids.is_quantised
        yield Comparison("G-hamming", "the model adds to the quantised encoder", self.chosen, HAMMING, code_only)
        statement = "the model adds to the quantised encoder's own distances"
        yield Comparison("G-adc", statement, self.chosen, ADC, code_only)
        if random is not None:
            ours, control = (decoded(arm, decoder="one_pass") for arm in (main, random))
            semantic = not main.docids.is_control
            yield Comparison("G-random", "semantic codes beat random codes", ours, control, semantic)

    def _twin(self) -> Iterator[Comparison]:
        twin, evaluation = self.config.twin, self.config.evaluation
        if twin is None:
            return
        within = f"diffusion is competitive with its twin (within {COMPETITIVE_MARGIN:.0%})"
        wide = decoded(twin, decoder="beam", beam=100), 100 in evaluation.beams
        whole = decoded(twin, decoder="exhaustive"), self.test.documents <= evaluation.exhaustive
        for reference, when in (wide, whole):
            name = reference.label.removeprefix(f"{twin} ")
            yield Comparison(f"E-outperforms {name}", "diffusion outperforms its twin", self.chosen, reference, when)
            yield Comparison(f"E-competitive {name}", within, self.chosen, reference, when, COMPETITIVE_MARGIN)

    def _quality(self) -> Iterator[Claim]:
        primary = self.config.evaluation.primary
        for one in (c for c in self.comparisons() if c.when):
            better, worse = self.test.outcome(one.better), self.test.outcome(one.worse)
            if primary in better.values and primary in worse.values:  # a beam of 10 has no Hit@100
                statement = f"{one.statement} ({one.better.label} against {one.worse.label}, {primary})"
                a, b = better.per_query(primary), worse.per_query(primary)
                yield self._claim(one.name, statement, a, b, one.margin)

    def _threshold(self) -> Iterator[Claim]:
        """Claim B: at the same mean number of steps, a confidence threshold beats a fixed budget.

        The fixed budget's quality at a fractional number of steps is interpolated between its neighbours, per
        query; the effect is the mean over thresholds that fall inside the measured budgets.
        """
        main, steps, evaluation = self.config.main, budgets(self.config), self.config.evaluation
        if "match" not in evaluation.decoders:
            return
        fixed = {t: self.test.outcome(decoded(main, decoder="match", steps=t)) for t in steps}
        ours, theirs = [], []
        for tau in evaluation.thresholds:
            outcome = self.test.outcome(decoded(main, decoder="match", threshold=tau))
            spent = outcome.fact("steps")
            if spent is not None and steps[0] <= spent <= steps[-1]:
                ours.append(outcome.per_query(evaluation.primary))
                theirs.append(_interpolated(fixed, spent, evaluation.primary))
        if ours:
            better = "a confidence threshold gives a better frontier than a fixed number of steps"
            statement = f"{better} (match, {evaluation.primary})"
            yield self._claim("B-threshold", statement, np.mean(ours, 0), np.mean(theirs, 0))

    def _latency(self) -> Iterator[Claim]:
        """Claim C: the effect is the mean of log(twin's ms / ours) over queries timed in turns (0: equal)."""
        main, twin, evaluation = self.config.main, self.config.twin, self.config.evaluation
        if twin is None or "match_rerank" not in evaluation.decoders:
            return
        ours = decoded(main, decoder="match_rerank", steps=budgets(self.config)[0])
        for beam in evaluation.beams:
            theirs = decoded(twin, decoder="beam", beam=beam)
            lower = f"fewer sequential steps mean lower latency than the twin at depth {evaluation.depth}"
            statement = f"{lower} ({ours.label} against {theirs.label}; effect is the mean log ratio of ms)"
            a, b = np.log(self.test.outcome(theirs).ms), np.log(self.test.outcome(ours).ms)
            yield self._claim(f"C-latency beam {beam}", statement, a, b)

    def _recovery(self) -> Iterator[Claim]:
        """Claim D: after a forced early error the gold document is in the top 10 more often than by the twin's beam."""
        if self.config.twin is None:
            return
        twin = _top(self.recovered[decoded(self.config.twin, decoder="beam", beam=RECOVERY_BEAM)])
        for rule in self.config.evaluation.remask:
            system = decoded(self.config.main, remask=rule)
            better = "any-order decoding survives an early error better than the twin"
            statement = f"{better} ({system.label}, gold in the top 10)"
            yield self._claim(f"D-recovery {rule}", statement, _top(self.recovered[system]), twin)

    def _claim(self, name: str, statement: str, a: np.ndarray, b: np.ndarray, margin: float = 0.0) -> Claim:
        how = self.config.evaluation
        return compare(name, statement, a, b, margin=margin, decisive=how.decisive, resamples=how.resamples)


def _top(seeds: Sequence[Recovery]) -> np.ndarray:
    """Whether the gold document is in the top 10, f64[S, Q]."""
    return np.array([seed.top for seed in seeds], dtype=float)


def _interpolated(fixed: Mapping[int, Outcome], steps: float, measure: str) -> np.ndarray:
    known = sorted(fixed)
    below = max(t for t in known if t <= steps)
    above = min(t for t in known if t >= steps)
    share = 0.0 if above == below else (steps - below) / (above - below)
    return (1 - share) * fixed[below].per_query(measure) + share * fixed[above].per_query(measure)
