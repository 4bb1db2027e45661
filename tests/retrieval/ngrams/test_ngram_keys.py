"""Weights of keys and scores of documents, against the definition in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.generate import NONE, Generated
from mobula.retrieval.ngrams.index import NgramIndex, Ranges, is_key
from mobula.retrieval.ngrams.keys import Keys, Scorer, log_odds, make_keys, weights
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Streams

LONGEST = 4
A, B, C, D, E = range(FIRST, FIRST + 5)


def index_of(rows: Sequence[Sequence[int]], segments: int = 1) -> NgramIndex:
    arrays = [np.array([*row, BREAK], np.int32) for row in rows]
    cuts = np.array_split(np.arange(len(rows)), segments)
    index = NgramIndex.build(Streams.of([arrays[i] for i in cuts[0]]), LONGEST)
    for cut in cuts[1:]:
        index = index.add(Streams.of([arrays[i] for i in cut]))
    return index


def ranges_of(index: NgramIndex, ngrams: Sequence[Sequence[int]]) -> Ranges:
    found = [index.find(np.array([ngram], np.int32)) for ngram in ngrams]
    empty = np.zeros((len(index.segments), 0), np.int64)
    low, high = (np.concatenate([empty, *(getattr(r, side) for r in found)], axis=1) for side in ("low", "high"))
    return Ranges(low, high, LONGEST)


def padded(ngrams: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([[*n, *[NONE] * (LONGEST - len(n))] for n in ngrams], np.int64).reshape(-1, LONGEST)


def keys_of(index: NgramIndex, weighted: dict[tuple[int, ...], float], single: dict[int, float]) -> Keys:
    """Keys with given weights, best first."""
    ngrams = sorted(weighted, key=lambda n: (-weighted[n], -len(n), n))
    values = np.zeros(len(index.frequencies) + 1)
    for code, value in single.items():
        values[code] = value
    return Keys(padded(ngrams), np.array([weighted[n] for n in ngrams]), ranges_of(index, ngrams), values)


def by_definition(rows: Sequence[Sequence[int]], weighted: dict[tuple[int, ...], float], beta: float) -> list[float]:
    """S(d) of every document: keys from the best on, occurrences that overlap no counted one, coverage."""
    order = sorted(weighted, key=lambda n: (-weighted[n], -len(n), n))
    scores = []
    for row in rows:
        taken: set[int] = set()
        covered: set[int] = set()
        score = 0.0
        for ngram in order:
            counted = False
            for begin in range(len(row) - len(ngram) + 1):
                cells = {begin + i for i, code in enumerate(ngram) if code >= FIRST}
                if tuple(row[begin : begin + len(ngram)]) == ngram and not cells & taken:
                    taken |= cells
                    counted = True
            tokens = {code for code in ngram if code >= FIRST}
            if counted:
                score += weighted[ngram] * (1 - beta + beta * len(tokens - covered) / len(tokens))
                covered |= tokens
        scores.append(score)
    return scores


def test_weight_is_the_difference_of_log_odds() -> None:
    """p(key | q) = 0.2 and (F + 5) / (T + 5) = 0.01: (log(0.25) - log(1/99))^2."""
    found = weights(np.array([math.log(0.2)]), np.array([5]), 995, 2.0)
    assert found[0] == pytest.approx((math.log(0.25) - math.log(1 / 99)) ** 2, rel=1e-12)
    assert weights(np.array([math.log(0.001)]), np.array([5]), 995, 2.0)[0] == 0.0  # less likely than its frequency


def test_frequent_ngram_weighs_less() -> None:
    """Trap 10: with equal log p; one never seen is finite as well."""
    found = weights(np.full(4, -3.0), np.array([0, 1, 30, 800]), 50_000, 2.0)
    assert (np.diff(found) < 0).all()
    assert np.isfinite(found).all()


def test_probabilities_near_one_are_finite() -> None:
    """Trap 10; and log-odds are exact where either form of log(1 - e^x) alone would not be."""
    certain = log_odds(np.array([0.0, -1e-300, -1e-17, -1e-7, -1e-6]))
    assert np.isfinite(certain).all()
    assert certain == pytest.approx(np.full(5, math.log(1e6)), rel=1e-6)
    for p in (1e-12, 0.3, 0.5, 0.7, 1 - 1e-5):
        assert log_odds(np.array([math.log(p)]))[0] == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-9)
    assert log_odds(np.array([-800.0]))[0] == pytest.approx(-800.0)
    assert np.isfinite(weights(np.array([0.0]), np.array([100]), 100, 2.0)).all()


def test_score_of_an_example() -> None:
    """By hand, beta = 0.8, weights: (A B) 9, (B C) 4, (D) 2, (C) 1.

    Document 0, A B C: (A B) counts 9; (B C) overlaps it; (C) is free and new: 9 + 1.
    Document 1, B C, then D: (B C) 4, (D) 2, and (C) has no occurrence of its own: 6.
    Document 2, A B D B C: (A B) 9; (B C) at the end is free, C is new and B is not: 4 * (0.2 + 0.8 / 2); (D) 2: 13.4.
    Document 3, C A B A B C: (A B) counts once, 9; (C) 1, though it stands there twice: 10.
    """
    rows = [[A, B, C], [B, C, D], [A, B, D, B, C], [C, A, B, A, B, C], [E]]
    index = index_of(rows)
    keys = keys_of(index, {(A, B): 9.0, (B, C): 4.0}, {D: 2.0, C: 1.0})
    found = Scorer(index, NgramConfig()).scores(keys)
    assert found == pytest.approx([10.0, 6.0, 13.4, 10.0, 0.0])


def test_covered_single_code_keeps_a_share() -> None:
    """(A B) 9 covers B; another B stands free, so (B) 5 gives 0.2 of its weight: 10 - and none where B is not free."""
    index = index_of([[A, B, C, B], [A, B]])
    keys = keys_of(index, {(A, B): 9.0}, {B: 5.0})
    assert Scorer(index, NgramConfig()).scores(keys) == pytest.approx([10.0, 9.0])


def test_overlapping_occurrences_are_counted_once() -> None:
    """(A A) in A A A: its second occurrence overlaps the first, so the last A is free for the single code."""
    index = index_of([[A, A, A], [A, A]])
    keys = keys_of(index, {(A, A): 9.0}, {A: 5.0})
    assert Scorer(index, NgramConfig()).scores(keys) == pytest.approx([10.0, 9.0])


def test_a_better_single_code_comes_first() -> None:
    """Where (B) outweighs (A B), the longer key overlaps a counted occurrence wherever it stands."""
    index = index_of([[A, B, C], [C]])
    keys = keys_of(index, {(A, B): 4.0}, {B: 5.0, A: 1.0})
    assert Scorer(index, NgramConfig()).scores(keys) == pytest.approx([6.0, 0.0])


@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_the_definition(seed: int) -> None:
    """Random corpora in one to three segments, random keys (titles among them), tied weights."""
    random = np.random.default_rng(seed)
    rows = [random.integers(FIRST, FIRST + 6, random.integers(1, 25)).tolist() for _ in range(20)]
    for row in rows[::3]:
        row[:0] = [TITLE, *random.integers(FIRST, FIRST + 6, random.integers(1, 3)).tolist(), TITLE_END]
    index = index_of(rows, segments=1 + seed % 3)
    ngrams = {tuple(row[i : i + n]) for row in rows for i in range(len(row)) for n in (2, 3, 4) if i + n <= len(row)}
    ngrams = sorted(n for n in ngrams if is_key(n))
    chosen = [ngrams[i] for i in random.permutation(len(ngrams))[:15]]
    weighted = {n: float(random.integers(1, 6)) for n in chosen}
    single = {code: float(random.integers(1, 4)) for code in range(FIRST, FIRST + 6) if random.random() < 0.6}
    config = NgramConfig(beta=0.7)
    found = Scorer(index, config).scores(keys_of(index, weighted, single))
    every = {**weighted, **{(code,): value for code, value in single.items()}}
    assert found == pytest.approx(by_definition(rows, every, 0.7))


def test_a_scorer_leaves_nothing_behind() -> None:
    index = index_of([[A, B, C], [B, C, D], [A, B, D, B, C]])
    scorer = Scorer(index, NgramConfig())
    keys = keys_of(index, {(A, B): 9.0, (B, C): 4.0}, {D: 2.0})
    first = scorer.scores(keys)
    scorer.scores(keys_of(index, {(B, C): 9.0, (C, D): 5.0}, {}))
    assert np.array_equal(scorer.scores(keys), first)


def test_frequent_keys_propose_no_document() -> None:
    """Keys above ``rare`` occurrences score documents that others propose; only the best proposals are scored."""
    index = index_of([[A, B, C], [A, B, D], [A, B, D, D], [E]])
    keys = keys_of(index, {(A, B): 9.0}, {D: 2.0, C: 1.0})
    assert Scorer(index, NgramConfig(rare=3)).scores(keys) == pytest.approx([10.0, 11.0, 11.0, 0.0])
    assert Scorer(index, NgramConfig(rare=2)).scores(keys) == pytest.approx([10.0, 0.0, 0.0, 0.0])
    assert Scorer(index, NgramConfig(candidates=1)).scores(keys) == pytest.approx([0.0, 11.0, 0.0, 0.0])


def test_keys_are_ordered_and_those_without_weight_are_gone() -> None:
    index = index_of([[A, B, C, D], [A, B, C, E]] * 3)
    ngrams = [(A, B), (A, B, C), (C, D), (C, E), (B, C)]
    log_p = np.array([-0.5, -0.5, -1.0, -1.0, -9.0])
    first = np.full(FIRST + 6, -20.0)
    first[[A, E]] = [-0.1, -2.0]
    found = Generated(padded(ngrams), log_p, ranges_of(index, ngrams), first, 1, 1)
    keys = make_keys(found, index, NgramConfig())
    # Equal log p and frequency: the longer key first, then by code; (B, C) is less likely than its frequency.
    assert [tuple(c for c in row if c != NONE) for row in keys.codes.tolist()] == [(A, B, C), (A, B), (C, D), (C, E)]
    assert keys.ranges.counts.tolist() == [6, 6, 3, 3]
    expected = weights(np.array([-0.1]), np.array([6]), index.tokens, 2.0)[0]
    assert keys.single[A] == pytest.approx(expected)
    assert keys.single[B] == 0.0
    assert make_keys(found, index, NgramConfig(unigrams=1)).single[E] == 0.0
    assert not make_keys(found, index, NgramConfig(), singles=False).single.any()
