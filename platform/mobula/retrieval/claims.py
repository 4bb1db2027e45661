"""The checkable claims of DiffuGR (spec, section 10b) on the outcomes of a test split.

Each claim compares systems by value; the effect is a paired mean difference over queries (and seeds). A claim is left
out only where the experiment says that a system of it is not evaluated; a system that should have been evaluated and
was not is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobula.evaluation.claims import compare, exceeds, holm_by_statement
from mobula.evaluation.intervals import matched_level
from mobula.experiment import Claim
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import Recovery
from mobula.retrieval.results import Split
from mobula.retrieval.systems import Decoded, budgets, decoded
from mobula.study import System

COMPETITIVE_MARGIN = 0.02  # "competitive": not worse by two points or more
RAW_EXACT = "raw_exact"
HAMMING, ADC = System("hamming"), System("adc")
RECOVERY_BEAM = 10  # width of the twin's beam that early errors are forced in


@dataclass(frozen=True)
class Comparison:
    """``better`` exceeds ``worse``, paired by query; ``when``: both are evaluated.

    ``measure``: of what, the primary one if empty. ``seen``: among queries of which a gold document has training
    queries, or among the others; None: all. ``doubt``: why nothing is decided, if so.
    """

    name: str
    statement: str
    better: System
    worse: System
    when: bool = True
    margin: float = 0.0
    measure: str = ""
    seen: bool | None = None
    doubt: str = ""


@dataclass(frozen=True)
class Claims:
    """The claims of a run. ``chosen`` is the diffusion system that dev prefers; ``recovered`` holds a value a seed.

    ``seen`` bool[Q] says of which test queries a gold document has training queries. ``twin_tuned``: dev preferred one
    learning rate of the twin to another.
    """

    config: Config
    test: Split
    chosen: Decoded
    recovered: Mapping[Decoded, Sequence[Recovery]]
    seen: np.ndarray
    twin_tuned: bool

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
        yield from self._raw()
        one_pass = decoded(main, decoder="one_pass")
        yield Comparison("F-rerank", adds, at("match_rerank", steps[-1]), one_pass, rerank)
        for name, decoder in (("F-beam", "beam"), ("F-best_of_n", "best_of_n"), ("F-chain", "chain_rescore")):
            yield Comparison(name, adds, decoded(main, decoder=decoder), one_pass)

    def _raw(self) -> Iterator[Comparison]:
        """Whether the generated docid itself, before any ranking, is right more often with more steps."""
        main, steps, plain = self.config.main, budgets(self.config), self.config.decode.remask
        few = decoded(main, decoder="match", steps=steps[0])
        named = {rule: {} if rule == plain else {"remask": rule} for rule in self.config.evaluation.remask}
        for rule, options in named.items():
            decoder = "match_rerank" if options else "match"
            many = decoded(main, decoder=decoder, steps=steps[-1], **options)
            statement = "the generated docid is right more often with more steps"
            yield Comparison(
                f"A-raw {rule}", statement, many, few, "match" in self.config.evaluation.decoders, measure=RAW_EXACT
            )

    def _semantics(self) -> Iterator[Comparison]:
        main, random, code_only = self.config.main, self.config.random, self.config.main.docids.is_quantised
        yield Comparison("G-hamming", "the model adds to the quantised encoder", self.chosen, HAMMING, code_only)
        statement = "the model adds to the quantised encoder's own distances"
        yield Comparison("G-adc", statement, self.chosen, ADC, code_only)
        for seen, name in ((True, "seen"), (False, "unseen")):
            some = code_only and bool((self.seen == seen).any())
            yield Comparison(f"G-adc {name}", statement, self.chosen, ADC, some, seen=seen)
        if random is not None:
            ours, control = (decoded(arm, decoder="one_pass") for arm in (main, random))
            semantic = not main.docids.is_control
            yield Comparison("G-random", "semantic codes beat random codes", ours, control, semantic)

    def _twin(self) -> Iterator[Comparison]:
        twin, evaluation = self.config.twin, self.config.evaluation
        if twin is None:
            return
        within = f"diffusion is competitive with its twin (within {COMPETITIVE_MARGIN:.0%})"
        doubt = "" if self.twin_tuned else "dev preferred none of the twin's learning rates to another"
        wide = decoded(twin, decoder="beam", beam=100), 100 in evaluation.beams
        whole = decoded(twin, decoder="exhaustive"), self.test.documents <= evaluation.exhaustive
        for reference, when in (wide, whole):
            name = reference.label.removeprefix(f"{twin} ")
            outperforms = Comparison(
                f"E-outperforms {name}", "diffusion outperforms its twin", self.chosen, reference, when, doubt=doubt
            )
            yield outperforms
            yield replace(outperforms, name=f"E-competitive {name}", statement=within, margin=COMPETITIVE_MARGIN)

    def _quality(self) -> Iterator[Claim]:
        for one in (c for c in self.comparisons() if c.when):
            better, worse = self.test.outcome(one.better), self.test.outcome(one.worse)
            measure = one.measure or self.config.evaluation.primary
            if measure in better.values and measure in worse.values:  # a beam of 10 has no Hit@100
                a, b = better.per_query(measure), worse.per_query(measure)
                kept = slice(None) if one.seen is None else self.seen == one.seen
                where = {None: "", True: ", gold document has training queries", False: ", gold document has none"}
                against = f"{one.better.label} against {one.worse.label}, {measure}{where[one.seen]}"
                statement = f"{one.statement} ({against})" + (f"; {one.doubt}" if one.doubt else "")
                yield self._claim(one.name, statement, a[:, kept], b[:, kept], one.margin, decided=not one.doubt)

    def _threshold(self) -> Iterator[Claim]:
        """Claim B: at as many network calls, a confidence threshold beats a fixed budget.

        The fixed budgets' quality is interpolated at the calls that the threshold took, inside every resample.
        """
        main, steps, evaluation = self.config.main, budgets(self.config), self.config.evaluation
        if "match" not in evaluation.decoders:
            return
        fixed = self._curve([decoded(main, decoder="match", steps=t) for t in steps])
        for tau in evaluation.thresholds:
            effect = matched_level(
                self._curve([decoded(main, decoder="match", threshold=tau)]), fixed, resamples=evaluation.resamples
            )
            better = "a confidence threshold is better than a fixed number of steps at as many network calls"
            statement = f"{better} (match tau={tau:g}, {evaluation.primary})"
            yield exceeds(f"B-threshold tau={tau:g}", statement, effect, decisive=evaluation.decisive)

    def _curve(self, systems: Sequence[Decoded]) -> tuple[np.ndarray, np.ndarray]:
        """Network calls and primary measure of systems, each f64[S, K, Q]."""
        outcomes = [self.test.outcome(system) for system in systems]
        quality = np.stack([outcome.per_query(self.config.evaluation.primary) for outcome in outcomes], 1)
        return np.stack([np.stack(outcome.calls) for outcome in outcomes], 1), quality

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
        """Claim D: after a forced early error the generated docid is right all the same more often than the twin's.

        The top 10 says little: documents are ranked by the table in which everything is masked, error or none.
        """
        if self.config.twin is None:
            return
        twin = _final(self.recovered[decoded(self.config.twin, decoder="beam", beam=RECOVERY_BEAM)])
        for rule in self.config.evaluation.remask:
            system = decoded(self.config.main, remask=rule)
            better = "any-order decoding survives an early error better than the twin"
            statement = f"{better} ({system.label}, final docid right)"
            yield self._claim(f"D-recovery {rule}", statement, _final(self.recovered[system]), twin)

    def _claim(
        self, name: str, statement: str, a: np.ndarray, b: np.ndarray, margin: float = 0.0, decided: bool = True
    ) -> Claim:
        how = self.config.evaluation
        decisive = how.decisive and decided
        return compare(name, statement, a, b, margin=margin, decisive=decisive, resamples=how.resamples)


def _final(seeds: Sequence[Recovery]) -> np.ndarray:
    """Whether the final docid is a relevant document's, f64[S, Q]."""
    return np.array([seed.final for seed in seeds], dtype=float)
