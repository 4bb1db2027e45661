"""The claims of a `dynamic_retrieval` run (spec, section 10b): comparisons of systems by value, as a list."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mobula.evaluation.claims import exceeds, holm_by_statement
from mobula.evaluation.intervals import Estimate, difference_estimate
from mobula.experiment import Claim
from mobula.retrieval.dynamic.config import SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import INITIAL_SHARE, ORACLE
from mobula.retrieval.dynamic.measures import arriving, average, generalisation, initial, spread
from mobula.retrieval.dynamic.results import Results

NOT_LEARNT = "has not learnt the initial documents as well as code-only retrieval finds them"
RANDOM = (("embed", "random"),)  # word vectors
MATCHES = 0.02  # "matches": not worse by two points or more
BM25, DENSE, DUAL, NGRAM, MULTIVIEW = map(SessionSystem, ("bm25", "dense", "dual", "ngram", "multiview"))


@dataclass(frozen=True)
class Comparison:
    """``better`` exceeds ``worse`` by an effect out of :data:`EFFECTS`, or falls short of it by less than a margin."""

    name: str
    statement: str
    better: SessionSystem
    worse: SessionSystem
    effect: str = "GA"
    margin: float = 0.0

    def claim(self, results: Results) -> Claim:
        """The claim with its verdict; a text system that has not learnt the initial documents decides nothing."""
        estimate, quantity = EFFECTS[self.effect]
        text = f"{self.statement} ({self.better} against {self.worse}, {quantity.format(results.primary)})"
        learnt = self.better not in results.texts or _learnt(results, self.better)
        if not learnt:
            text += f"; {self.better} {NOT_LEARNT}"
        decisive = results.config.evaluation.decisive and learnt
        effect = estimate(results, self.better, self.worse)
        return exceeds(self.name, text, effect, margin=self.margin, decisive=decisive)


def claims(results: Results) -> Iterator[Claim]:
    """Every claim whose systems were evaluated; Holm's correction within a statement."""
    yield from holm_by_statement(_claims(results))


def _claims(results: Results) -> Iterator[Claim]:
    for comparison in comparisons(results):
        if {comparison.better, comparison.worse} <= results.systems.keys():
            yield comparison.claim(results)
    for multi, single in _several_and_one(results):
        if {multi, single, NGRAM} <= results.systems.keys():
            yield _gap_closed(results, multi, single)
    for text, numeric in itertools.product(results.texts, results.numeric):
        if {SessionSystem(system.arm, RANDOM) for system in (text, numeric)} <= results.systems.keys():
            yield _helped_more(results, text, numeric)


def comparisons(results: Results) -> Iterator[Comparison]:
    """Claims F to K, of all systems that are comparable, evaluated or not."""
    for text, numeric in itertools.product(results.texts, results.numeric):
        yield Comparison(f"F1 {text} {numeric}", "text docids generalise better than numeric ones", text, numeric)
    by_family = {system.family: system for system in results.texts}
    chain = [NGRAM, *(by_family[family] for family in ("text.keywords", "text.title") if family in by_family)]
    for finer, coarser in itertools.pairwise(chain):
        yield Comparison(f"F2 {finer} {coarser}", "the finer the docid, the better", finer, coarser)
    for multi, _ in _several_and_one(results):
        for more, fewer in _falling(results, multi, "per_document", results.config.chunks.per_document):
            yield Comparison(f"F2-chunks {more} {fewer}", "more chunks a document are better", more, fewer)
    match = f"fine text docids match dense (within {MATCHES:.0%})"
    for text in (NGRAM, MULTIVIEW):
        yield Comparison(f"F3-bm25 {text} {BM25}", "fine text docids beat BM25", text, BM25)
        yield Comparison(f"F3-dense {text} {DUAL}", match, text, DUAL, margin=MATCHES)
    biased = "numeric docids are biased towards the initial documents, beyond relevance"
    for numeric in results.numeric:
        yield Comparison(f"G-initial-share {numeric}", biased, numeric, BM25, "initial share")
        yield Comparison(f"G-oracle {numeric}", "that bias is what costs", numeric, DENSE, "oracle gain")
        for steady in (BM25, DENSE):
            statement = f"{steady} is steadier over sessions than numeric docids"
            yield Comparison(f"K-{steady} {numeric}", statement, numeric, steady, "range")
    for multi, single in _several_and_one(results):
        yield Comparison("H-better", "several docids generalise better than one", multi, single)
        yield Comparison("H-latency", "numeric latency is kept", multi, NGRAM, "latency")
        same = f"several docids cost nothing (within {MATCHES:.0%})"
        yield Comparison("H-initial", f"{same} on the initial documents alone", multi, single, "P[0,0]", MATCHES)
        yield Comparison("H-average", f"{same} over all sessions at the end", multi, single, "AP", MATCHES)
    for given in (*results.texts, *results.numeric):
        kind, random = "text" if given in results.texts else "numeric", SessionSystem(given.arm, RANDOM)
        yield Comparison(f"I-{given}", f"pretrained word vectors help {kind} docids", given, random)
    for text in results.texts:
        for more, fewer in _falling(results, text, "most_frequent", math.inf):
            yield Comparison(f"J {more} {fewer}", "more distinct tokens in docids are better", more, fewer)


def _falling(
    results: Results, plain: SessionSystem, setting: str, given: float
) -> Iterator[tuple[SessionSystem, SessionSystem]]:
    """A system, which has ``given``, and those that differ in one setting: each with the next smaller one."""
    others = [each for each in results.systems if each.arm == plain.arm and [*dict(each.options)] == [setting]]
    values = {plain: given, **{each: float(dict(each.options)[setting]) for each in others}}
    yield from itertools.pairwise(sorted(values, key=values.__getitem__, reverse=True))


def _several_and_one(results: Results) -> Iterator[tuple[SessionSystem, SessionSystem]]:
    """The first multi_chunk system, and the one of the same codes with one docid a document."""
    for multi in [system for system in results.config.multis if not system.options][:1]:
        yield multi, SessionSystem(f"{multi.paradigm}/{results.config.docid.family}")


def _learnt(results: Results, system: SessionSystem) -> bool:
    """Whether a text system finds initial documents as well as code-only retrieval, or shows nothing of docids."""
    reference = [float(results.p(each)[0, 0]) for each in results.systems if each.paradigm == "adc"]
    return not reference or float(results.p(system)[0, 0]) >= max(reference)


def _initial_share(results: Results, a: SessionSystem, b: SessionSystem) -> Estimate:
    tables = (results.diagonal(system, INITIAL_SHARE) for system in (a, b))
    return results.estimate(lambda ours, theirs: arriving(ours) - arriving(theirs), *tables)


def _oracle_gain(results: Results, a: SessionSystem, b: SessionSystem) -> Estimate:
    """(O - P) of one system minus (O - P) of another."""
    tables = [(results.diagonal(system, ORACLE), results.table(system, "Hit@10")) for system in (a, b)]
    return results.estimate(
        lambda o, p, other_o, other_p: arriving(o) - generalisation(p) - (arriving(other_o) - generalisation(other_p)),
        *itertools.chain(*tables),
    )


def _latency(results: Results, a: SessionSystem, b: SessionSystem) -> Estimate:
    logs = (np.log(results.systems[system].ms) for system in (b, a))
    return difference_estimate(*logs, resamples=results.config.evaluation.resamples)


def _gap_closed(results: Results, multi: SessionSystem, single: SessionSystem) -> Claim:
    """(GA multi - GA single) / (GA ngram - GA single); undecided where the denominator may be zero."""
    ga = generalisation

    def share(several: np.ndarray, one: np.ndarray, ngram: np.ndarray) -> np.ndarray:
        gap = ga(ngram) - ga(one)
        return (ga(several) - ga(one)) / np.where(np.abs(gap) > 1e-9, gap, np.inf)  # of no gap nothing is closed

    effect = results.estimate(share, *(results.table(system, results.primary) for system in (multi, single, NGRAM)))
    defined = results.difference(NGRAM, single, ga).interval()[0] > 0
    text = f"several docids close part of the gap to n-grams ({multi}; share of the gap, GA of {results.primary})"
    if not defined:
        text += "; the gap's own interval holds zero, so the share is not defined"
    learnt = _learnt(results, NGRAM)
    if not learnt:
        text += f"; {NGRAM} {NOT_LEARNT}"
    return exceeds("H-gap", text, effect, decisive=results.config.evaluation.decisive and defined and learnt)


def _helped_more(results: Results, text: SessionSystem, numeric: SessionSystem) -> Claim:
    """(GA text - GA of it with random word vectors) - the same of a numeric system."""
    pairs = [(system, SessionSystem(system.arm, RANDOM)) for system in (text, numeric)]
    tables = (results.table(system, results.primary) for system in itertools.chain(*pairs))

    effect = results.estimate(
        lambda text, text_random, numeric, numeric_random: (
            generalisation(text)
            - generalisation(text_random)
            - generalisation(numeric)
            + generalisation(numeric_random)
        ),
        *tables,
    )
    statement = f"pretrained word vectors help text docids more than numeric ones ({text} against {numeric}, GA)"
    return exceeds(f"I-more {text} {numeric}", statement, effect, decisive=results.config.evaluation.decisive)


# By name: the effect of one system over another, and what it is called.
EFFECTS: dict[str, tuple[Callable[[Results, SessionSystem, SessionSystem], Estimate], str]] = {
    "GA": (lambda results, a, b: results.difference(a, b, generalisation), "GA of {}"),
    "P[0,0]": (lambda results, a, b: results.difference(a, b, initial), "P[0,0] of {}"),
    "AP": (lambda results, a, b: results.difference(a, b, average), "AP of {}"),
    "range": (lambda results, a, b: results.difference(a, b, spread), "range of P[t, t], {}"),
    "initial share": (_initial_share, "share of initial documents in the top 10 of new documents' queries"),
    "oracle gain": (_oracle_gain, "gain of Hit@10 by decoding among the session's documents alone"),
    "latency": (_latency, "mean log ratio of ms"),
}
