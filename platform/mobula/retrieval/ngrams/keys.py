"""From generated n-grams to documents: the weight of a key, and the score of a document.

Shapes: K keys of at most L codes, V codes, N documents, M occurrences of keys, P pairs of a document and a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.generate import NONE, Generated
from mobula.retrieval.ngrams.index import NgramIndex, Ranges
from mobula.retrieval.ngrams.stream import FIRST

SMOOTHING = 5.0
NO_OCCURRENCE = np.iinfo(np.int64).max
SUREST = -1e-6  # largest log-probability: the log-odds of certainty would be infinite


@dataclass(frozen=True)
class Keys:
    """Keys of several codes with positive weight, best first, and the weight of every single code.

    ``codes`` i64[K, L] (padded with -1), ``weights`` f64[K], ``ranges`` of each; ``single`` f64[V], 0 where a code is
    no key.
    """

    codes: np.ndarray
    weights: np.ndarray
    ranges: Ranges
    single: np.ndarray


def log_odds(log_p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of log-probabilities f64[...], finite also where p is 1 to the last bit."""
    x = np.minimum(log_p, SUREST)
    # log(1 - e^x): either form alone loses its digits at one end.
    near_one = x > -np.log(2.0)
    rest = np.where(near_one, np.log(-np.expm1(np.where(near_one, x, -1.0))), np.log1p(-np.exp(x)))
    return x - rest


def weights(log_p: np.ndarray, frequency: np.ndarray, tokens: int, alpha: float) -> np.ndarray:
    """Weights f64[K] of keys with log p(key | query) f64[K] that occur ``frequency`` times among ``tokens``.

    max(0, log-odds given the query - log-odds of the frequency)^alpha, as in SEAL (2204.10628).
    """
    expected = np.log((frequency + SMOOTHING) / (tokens + SMOOTHING))
    return np.maximum(0.0, log_odds(log_p) - log_odds(expected)) ** alpha


def make_keys(generated: Generated, index: NgramIndex, config: NgramConfig, *, singles: bool = True) -> Keys:
    """The keys of a query; without ``singles`` no code is a key by itself."""
    weight = weights(generated.log_p, generated.ranges.counts, index.tokens, config.alpha)
    order = np.flatnonzero(weight > 0)
    length = (generated.codes[order] != NONE).sum(1)
    order = order[np.lexsort((*generated.codes[order].T[::-1], -length, -weight[order]))]
    single = _singles(generated.first, index, config) if singles else np.zeros(len(generated.first))
    return Keys(generated.codes[order], weight[order], generated.ranges.rows(order), single)


def _singles(first: np.ndarray, index: NgramIndex, config: NgramConfig) -> np.ndarray:
    """Weights f64[V] of the most probable first codes, 0 for all others."""
    frequency = np.zeros(len(first))
    frequency[: len(index.frequencies)] = index.frequencies
    possible = np.flatnonzero(frequency > 0)
    possible = possible[possible >= FIRST]
    best = possible[np.argsort(-first[possible], kind="stable")[: config.unigrams]]
    single = np.zeros(len(first))
    single[best] = weights(first[best], frequency[best], index.tokens, config.alpha)
    return single


class Scorer:
    """Scores documents by keys; holds work arrays as long as the index, so it serves one thread."""

    def __init__(self, index: NgramIndex, config: NgramConfig) -> None:
        self.index, self.config = index, config
        self._best = np.full(len(index.codes), NO_OCCURRENCE)
        self._taken = np.zeros(len(index.codes), bool)

    def scores(self, keys: Keys) -> np.ndarray:
        """S(d) f64[N]; 0 for documents that no key proposes.

        Keys with few occurrences propose documents by the plain sum of their weights; the best of these are scored
        in full: every key counts once, by how many of its tokens no better key has covered, and only if one of its
        occurrences overlaps no counted occurrence of a better key.
        """
        postings = self.index.postings
        row, position = self.index.positions(keys.ranges)
        document = postings.document[postings.pair[position]]
        proposed = self._proposed(keys, row, document)
        # A better single code that a key holds is counted wherever the key occurs, unless something better still is.
        # Either way the key's occurrences all overlap a counted one.
        tokens = np.where(keys.codes >= FIRST, keys.codes, 0)
        beaten = np.where(keys.codes >= FIRST, keys.single[tokens], 0.0).max(1, initial=0.0) > keys.weights
        kept = proposed[document] & ~beaten[row]
        scores = postings.sums(keys.single)
        scores += self._of_ngrams(keys, row[kept], position[kept], document[kept])
        return np.where(proposed, np.maximum(scores, 0.0), 0.0)

    def _proposed(self, keys: Keys, row: np.ndarray, document: np.ndarray) -> np.ndarray:
        """Which documents bool[N] are scored in full."""
        frequencies = self.index.frequencies
        single = keys.single.copy()
        single[: len(frequencies)][frequencies > self.config.rare] = 0.0
        partial = self.index.postings.sums(single)
        rare = keys.ranges.counts <= self.config.rare
        # Occurrences are sorted by key and position, so those in one document stand together.
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
        new &= rare[row]
        np.add.at(partial, document[new], keys.weights[row[new]])
        proposed = partial > 0
        if proposed.sum() > self.config.candidates:
            best = np.argsort(-partial, kind="stable")[: self.config.candidates]
            proposed = np.zeros_like(proposed)
            proposed[best] = True
        return proposed

    def _of_ngrams(self, keys: Keys, row: np.ndarray, position: np.ndarray, document: np.ndarray) -> np.ndarray:
        """What keys of several codes add to f64[N], and what they take away from single codes they cover."""
        postings, beta = self.index.postings, self.config.beta
        is_token = keys.codes[row] >= FIRST
        cells = position[:, None] + np.arange(keys.codes.shape[1])
        counted = self._counted(cells, is_token)
        row, document, cells, is_token = row[counted], document[counted], cells[counted], is_token[counted]
        scores = np.zeros(len(self.index))
        # One line for each key, document and token of it that are counted together, best key first.
        owner = np.repeat(np.arange(len(row)), is_token.sum(1))
        pair = postings.pair[cells[is_token]].astype(np.int64)
        lines = np.unique(row[owner] * len(postings.document) + pair)
        of_key, of_pair = np.divmod(lines, len(postings.document))
        touched, first = np.unique(of_pair, return_index=True)
        is_new = np.zeros(len(lines), bool)
        is_new[first] = True
        of_document = postings.document[of_pair]
        groups = np.flatnonzero(np.diff(of_key * len(self.index) + of_document, prepend=-1))
        if len(groups):
            share = np.add.reduceat(is_new, groups, dtype=np.int64) / np.diff(groups, append=len(lines))
            gained = keys.weights[of_key[groups]] * (1 - beta + beta * share)
            np.add.at(scores, of_document[groups], gained)
        # A single code stands behind the keys that hold it: covered, and gone where they leave no occurrence free.
        inside = np.bincount(np.searchsorted(touched, pair), minlength=len(touched))
        free = postings.count[touched] > inside
        lost = keys.single[postings.code[touched]] * np.where(free, beta, 1.0)
        np.subtract.at(scores, postings.document[touched], lost)
        return scores

    def _counted(self, cells: np.ndarray, is_token: np.ndarray) -> np.ndarray:
        """Which occurrences bool[M] overlap no better counted one; cells i64[M, L] are their positions, best first.

        In each round those count that are the best left at all of their positions, and those they overlap are out.
        """
        counted = np.zeros(len(cells), bool)
        cells = np.where(is_token, cells, cells[:, :1] + is_token.argmax(1)[:, None])  # padding repeats the first token
        left = np.arange(len(cells))
        while len(left):
            here = cells[left]
            np.minimum.at(self._best, here, left[:, None])
            won = (self._best[here] == left[:, None]).all(1)
            self._best[here] = NO_OCCURRENCE
            counted[left[won]] = True
            self._taken[here[won]] = True
            left = left[~won & ~self._taken[here].any(1)]
        self._taken[cells[counted]] = False
        return counted
