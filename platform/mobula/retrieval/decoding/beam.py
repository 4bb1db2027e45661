"""Any-order beam search over partial codes (ours; spec 6.3).

A beam is a partial code z i64[L] with a score, the sum of log-probabilities in the order in which it was
filled. All beams of a step have the same number of filled positions, so scores are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mobula.retrieval.decoding.batched_calls import Decoding
from mobula.retrieval.decoding.corpus import Corpus, top
from mobula.retrieval.decoding.scores import monte_carlo
from mobula.retrieval.search import SearchOptions, StepEvent

MASK = -1


@dataclass
class Beams:
    """B beams, best first: codes i64[B, L], scores f64[B], possible documents u64[B, W] (None: unconstrained)."""

    z: np.ndarray
    scores: np.ndarray
    valid: np.ndarray | None


def beam_search(
    corpus: Corpus,
    options: SearchOptions,
    first: np.ndarray,
    rng: np.random.Generator,
    events: list[StepEvent] | None = None,
) -> Decoding[Beams]:
    """The best full codes in the order of ``beam_score``; ``first`` f64[L, K] is the table of step 1.

    Filling m = ``beam_per_step`` levels a step costs L/m calls. Within a step the tables stay those of the
    step's beginning.
    """
    valid = corpus.bitset.all_valid(1) if options.constraint == "bitset" else None
    beams = Beams(np.full((1, corpus.levels), MASK, np.int64), np.zeros(1), valid)
    tables = first[None]
    for filled in range(0, corpus.levels, options.beam_per_step):
        if filled:
            tables = yield beams.z
        before = beams.z[0]
        table_of = np.arange(len(beams.z))
        for done in range(options.beam_per_step):
            beams, parents = _expand(corpus, options, beams, tables[table_of], filled + done + 1)
            table_of = table_of[parents]
        if events is not None:
            probs = np.exp(tables[table_of[0]][np.arange(corpus.levels), beams.z[0]])
            left = len(corpus) if beams.valid is None else int(corpus.bitset.count(beams.valid[:1])[0])
            events.append(best_changed(len(events) + 1, before, beams.z[0], probs, left))
    if options.beam_score == "path":
        return beams
    if options.beam_score == "one_pass":
        scores = first[np.arange(corpus.levels), beams.z].sum(1)
    else:
        scores = yield from monte_carlo(beams.z, options.mc, rng)
    order = top(scores, len(scores))
    return Beams(beams.z[order], scores[order], None if beams.valid is None else beams.valid[order])


def _expand(
    corpus: Corpus, options: SearchOptions, beams: Beams, tables: np.ndarray, filled: int
) -> tuple[Beams, np.ndarray]:
    """The B best distinct codes with one more level filled (``filled`` in all), and each one's parent beam.

    ``tables`` f64[B, L, K] holds each beam's log-probabilities.
    """
    possible = (beams.z == MASK)[:, :, None] & ~np.isneginf(tables)
    if beams.valid is not None:
        possible &= corpus.bitset.allowed_all(beams.valid)
    gains = np.where(possible, tables, -np.inf).reshape(len(tables), -1)
    totals = beams.scores[:, None] + _best_of_each(gains, options.beam_topc or 2 * options.beam)
    parent, pair = np.nonzero(~np.isneginf(totals))
    totals = totals[parent, pair]
    # One code is reached from at most ``filled`` parents, so these candidates hold the B best distinct ones.
    best = top(totals, options.beam * filled)
    parent, (level, code), totals = parent[best], np.divmod(pair[best], tables.shape[2]), totals[best]
    z = beams.z[parent]
    z[np.arange(len(z)), level] = code
    # The first of equal codes is the one with the larger score.
    kept = np.sort(np.unique(z, axis=0, return_index=True)[1])[: options.beam]
    parent = parent[kept]
    valid = None
    if beams.valid is not None:
        valid = corpus.bitset.commit(beams.valid[parent], level[kept], code[kept])
    return Beams(z[kept], totals[kept], valid), parent


def _best_of_each(gains: np.ndarray, count: int) -> np.ndarray:
    """``gains`` f64[B, P] with all but the ``count`` highest of each row at -inf; ties of the last one stay."""
    if count >= gains.shape[1]:
        return gains
    least = np.partition(gains, -count, axis=1)[:, -count, None]
    return np.where(gains >= least, gains, -np.inf)


def best_changed(step: int, before: np.ndarray, now: np.ndarray, probs: np.ndarray, left: int) -> StepEvent:
    """How the best beam changed from ``before`` to ``now`` i64[L]: codes it has gained, levels it has given up.

    ``probs`` f64[L] holds the probability of each of its codes, ``left`` counts the documents it may still be.
    """
    gained = np.flatnonzero((now != before) & (now != MASK))
    lost = np.flatnonzero((now != before) & (before != MASK))
    return StepEvent(step, [(int(i), int(now[i]), float(probs[i])) for i in gained], lost.tolist(), left)
