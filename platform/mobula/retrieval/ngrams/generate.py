"""Generating n-grams that occur in the corpus: a beam over the index, in step for all queries.

Shapes: Q queries, G hypotheses each, H = Q * G, V codes, L codes of the longest key, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mobula.cancellation import raise_if_cancelled
from mobula.retrieval.network import Memory
from mobula.retrieval.ngrams.index import NgramIndex, Ranges
from mobula.retrieval.ngrams.language import Speaker
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END

NONE = -1  # pads keys to one length


@dataclass
class Generated:
    """What one query generated: K keys of more than one code, and the distribution of the first code.

    ``codes`` i64[K, L] (padded with -1), their log-probability ``log_p`` f64[K] under the unconstrained model, where
    they occur, and ``first`` f64[V], the log-probabilities of single codes. ``steps`` and ``rows`` say what it cost.
    """

    codes: np.ndarray
    log_p: np.ndarray
    ranges: Ranges
    first: np.ndarray
    steps: int
    rows: int


@dataclass
class _Found:
    """Keys that a step added: rows of the batch, codes, log-probabilities, ranges."""

    query: np.ndarray
    codes: np.ndarray
    log_p: np.ndarray
    ranges: Ranges


def generate(
    speaker: Speaker,
    memory: Memory,
    index: NgramIndex,
    *,
    width: int,
    max_len: int,
    together: int,
    titles_only: bool = False,
) -> list[Generated]:
    """The n-grams that survive a step of a beam of ``width``, for every query of ``memory``.

    Hypotheses are extended by codes that follow them somewhere in the corpus; their probabilities are those of the
    unconstrained model, so no constraint has to be undone. Keys of tokens have at most ``max_len``; titles have their
    two marks besides. With ``titles_only`` whole titles are the only keys.

    A call of the layers always serves ``together`` queries, missing ones padded, so that the bits of a query's result
    depend on the query alone. It costs little more for many queries than for one. Scoring all codes costs its share
    of every hypothesis, so that is done query by query, for the hypotheses that can go on.
    """
    results: list[Generated] = []
    for start in range(0, memory.size, together):
        part = torch.arange(start, min(start + together, memory.size), device=memory.mask.device)
        beam = _Beam(_Steps(speaker, memory.rows(part), width, together), index, width, max_len)
        beam.begin(titles_only)
        steps = [step for _ in range(1, beam.longest) if (step := beam.advance()) is not None]
        results.extend(_by_query(steps, beam))
    return results


class _Beam:
    """The hypotheses of some queries, one code longer with each :meth:`advance`; dead ones have an empty range."""

    def __init__(self, steps: _Steps, index: NgramIndex, width: int, max_len: int) -> None:
        self.network, self.index, self.width, self.max_len = steps, index, width, max_len
        self.longest = steps.speaker.network.levels
        self.queries = steps.queries
        self.steps = np.ones(self.queries, np.int64)
        self.rows = np.ones(self.queries, np.int64)

    def begin(self, titles_only: bool) -> None:
        """The best first codes."""
        self.first = self.network.start()
        present = np.zeros(self.first.shape[1], bool)
        present[: len(self.index.frequencies)] = self.index.frequencies > 0
        present[[BREAK, TITLE_END]] = False
        present[FIRST:] &= not titles_only
        codes = np.flatnonzero(present)
        if not len(codes):
            codes = np.array([TITLE])  # which occurs nowhere, so every hypothesis is dead
        query = np.repeat(np.arange(self.queries), len(codes))
        totals = self.first[:, codes].ravel()
        chosen, alive = self._best(query, totals)
        codes = np.tile(codes, self.queries)[chosen]
        self.codes = codes[:, None].astype(np.int64)
        self.log_p = np.where(alive, totals[chosen], -np.inf)
        self.titles = codes == TITLE
        root = self.index.root(len(codes))
        self.ranges = self.index.extend(root, codes).rows(np.arange(len(codes)), alive)
        self.parents = np.zeros((self.queries, self.width), np.int64)

    def advance(self) -> _Found | None:
        """Extend every hypothesis; None if none can be."""
        row, code = self.index.successors(self._extendable(), self.titles)
        if not len(row):
            return None
        raise_if_cancelled()
        totals = self.log_p[row] + self.network.step(self.parents, self.codes[:, -1], row, code)
        extended = np.bincount(np.unique(row) // self.width, minlength=self.queries)
        self.steps += extended > 0
        self.rows += extended
        chosen, alive = self._best(row // self.width, totals)
        row, code = row[chosen], code[chosen]
        self.parents = np.where(alive, row % self.width, 0).reshape(self.queries, self.width)
        self.codes = np.column_stack([self.codes[row], code])
        self.log_p = np.where(alive, totals[chosen], -np.inf)
        self.titles = self.titles[row]
        ranges = self.index.extend(self.ranges.rows(row), code)
        done = code == TITLE_END
        self.ranges = ranges.rows(np.arange(len(row)), alive & ~done)
        keys = np.flatnonzero(alive & (done | ~self.titles))
        query = keys // self.width
        return _Found(query, self.codes[keys], self.log_p[keys], ranges.rows(keys))

    def _extendable(self) -> Ranges:
        """The ranges, those of token keys of full length emptied."""
        if self.ranges.depth < self.max_len:
            return self.ranges
        return self.ranges.rows(np.arange(len(self.titles)), self.titles)

    def _best(self, query: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query the ``width`` largest of its ``totals`` f64[C], best first: indices i64[H], and bool[H] which
        of them there are. Of equals the first wins."""
        bounds = np.searchsorted(query, np.arange(self.queries + 1))
        chosen = np.zeros((self.queries, self.width), np.int64)
        alive = np.zeros((self.queries, self.width), bool)
        for i in range(self.queries):
            part = totals[bounds[i] : bounds[i + 1]]
            best = _largest(part, self.width)
            chosen[i, : len(best)] = bounds[i] + best
            alive[i, : len(best)] = True
        return chosen.ravel(), alive.ravel()


class _Steps:
    """The language model's part of a beam: log-probabilities step by step, for at most ``together`` queries."""

    def __init__(self, speaker: Speaker, memory: Memory, width: int, together: int) -> None:
        self.speaker, self.width, self.queries = speaker, width, memory.size
        # Repeating the last query fills the call.
        self._filled = np.minimum(np.arange(together), memory.size - 1)
        with torch.inference_mode():
            self._memory = memory.rows(torch.from_numpy(self._filled).to(memory.mask.device))
            self._cache = speaker.network.start(self._memory, 1)

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        """Log-probabilities f64[Q, V] of the first code."""
        hidden, self._cache = self.speaker.network.step(self._memory, self._cache, None)
        # Copied, since the bits of a product can depend on where in memory its factors begin.
        log_probs = torch.cat([self.speaker.log_probs(one.clone()) for one in hidden[: self.queries]])
        return log_probs.double().cpu().numpy()

    @torch.inference_mode()
    def step(self, parents: np.ndarray, previous: np.ndarray, row: np.ndarray, code: np.ndarray) -> np.ndarray:
        """Log-probabilities f64[C] of ``code`` behind hypothesis ``row`` (sorted), whose last code is ``previous``.

        ``parents`` i64[Q, G] are the hypotheses of the step before that the present ones i64[H] continue.
        """
        device = self._memory.mask.device
        cache = self._cache.reorder(torch.from_numpy(parents[self._filled]).to(device))
        last = torch.from_numpy(previous.reshape(-1, self.width)[self._filled]).to(device)
        hidden, self._cache = self.speaker.network.step(self._memory, cache, last)
        alive, slot = np.unique(row, return_inverse=True)
        of_query = np.searchsorted(alive, np.arange(self.queries + 1) * self.width)
        bounds = np.searchsorted(slot, of_query)
        rows, slots, codes = (torch.from_numpy(array).to(device) for array in (alive, slot, code))
        scored = []
        for query in np.flatnonzero(np.diff(bounds)).tolist():
            own, part = (slice(*ends[query : query + 2]) for ends in (of_query, bounds))
            log_probs = self.speaker.log_probs(hidden.flatten(0, 1)[rows[own]])
            scored.append(log_probs[slots[part] - own.start, codes[part]])
        return torch.cat(scored).double().cpu().numpy()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, largest first; of equals the first."""
    indices = np.arange(len(values))
    if len(values) > count:
        least = np.partition(values, len(values) - count)[len(values) - count]
        indices = np.flatnonzero(values >= least)
    return indices[np.argsort(-values[indices], kind="stable")][:count]


def _by_query(steps: list[_Found], beam: _Beam) -> Iterator[Generated]:
    """The keys of every query, shorter ones first."""
    longest = beam.longest
    segments = len(beam.index.segments)
    query = np.concatenate([np.zeros(0, np.int64), *(step.query for step in steps)])
    padded = (np.pad(s.codes, ((0, 0), (0, longest - s.codes.shape[1])), constant_values=NONE) for s in steps)
    codes = np.concatenate([np.zeros((0, longest), np.int64), *padded])
    log_p = np.concatenate([np.zeros(0), *(step.log_p for step in steps)])
    empty = np.zeros((segments, 0), np.int64)
    low = np.concatenate([empty, *(step.ranges.low for step in steps)], axis=1)
    high = np.concatenate([empty, *(step.ranges.high for step in steps)], axis=1)
    for i in range(beam.queries):
        own = np.flatnonzero(query == i)
        ranges = Ranges(low[:, own], high[:, own], longest)
        yield Generated(codes[own], log_p[own], ranges, beam.first[i], int(beam.steps[i]), int(beam.rows[i]))
