"""Generating n-grams that occur in the corpus: a beam over the index, in step for all queries.

Shapes: Q queries, G hypotheses each, H = Q * G, V codes, L codes of the longest key, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobula.cancellation import raise_if_cancelled
from mobula.retrieval.decoding.calls import device_of, tiles
from mobula.retrieval.network import Cache, DocidTransformer, Memory
from mobula.retrieval.ngrams.index import NgramIndex, Ranges
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
    network: DocidTransformer, memory: Memory, index: NgramIndex, *, width: int, max_len: int, titles_only: bool
) -> list[Generated]:
    """The n-grams that survive a step of a beam of ``width``, for every query of ``memory``.

    Hypotheses are extended by codes that follow them somewhere in the corpus; their probabilities are those of the
    unconstrained model, so no constraint has to be undone. Keys of tokens have at most ``max_len``; titles have their
    two marks besides. With ``titles_only`` whole titles are the only keys.
    """
    beam = _Beam(network, memory, index, width, max_len)
    beam.begin(titles_only)
    found = [step for _ in range(1, network.levels) if (step := beam.advance()) is not None]
    return list(_by_query(found, beam))


class _Beam:
    """All queries' hypotheses, one code longer with each :meth:`advance`; dead ones have an empty range."""

    def __init__(self, network: DocidTransformer, memory: Memory, index: NgramIndex, width: int, max_len: int) -> None:
        self.network, self.index, self.width, self.max_len = network, index, width, max_len
        self.queries = memory.size
        self.tiles = list(_tiles(network, memory, width))
        self.steps = np.ones(self.queries, np.int64)
        self.rows = np.ones(self.queries, np.int64)

    def begin(self, titles_only: bool) -> None:
        """The best first codes."""
        logits = np.concatenate([tile.start() for tile in self.tiles])[: self.queries]
        self.first = logits.astype(np.float64)
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
        totals = self.log_p[row] + self._log_p(row, code)
        asked = np.bincount(np.unique(row) // self.width, minlength=self.queries)
        self.steps += asked > 0
        self.rows += asked
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

    def _log_p(self, row: np.ndarray, code: np.ndarray) -> np.ndarray:
        """Log-probability f64[C] of each code i32[C] behind its hypothesis i64[C] (sorted)."""
        parts = []
        size = self.tiles[0].queries
        bounds = np.searchsorted(row, np.arange(len(self.tiles) + 1) * size * self.width)
        for i, tile in enumerate(self.tiles):
            part = slice(bounds[i], bounds[i + 1])
            if part.start == part.stop:
                continue  # its hypotheses are dead and stay so
            parents = self.parents[i * size : (i + 1) * size]
            previous = self.codes[i * size * self.width : (i + 1) * size * self.width, -1]
            parts.append(tile.step(parents, previous, row[part] - i * size * self.width, code[part]))
        return np.concatenate(parts)

    def _best(self, query: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query the ``width`` largest of its ``totals`` f64[C], best first: places i64[H], and bool[H] which
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


class _Tile:
    """A fixed number of queries that share network calls, so that the bits of a result depend on the query alone."""

    def __init__(self, network: DocidTransformer, memory: Memory, width: int) -> None:
        self.network, self.memory, self.width, self.queries = network, memory, width, memory.size
        self.cache: Cache | None = None

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        """Log-probabilities f32[queries, V] of the first code."""
        logits, self.cache = self.network.step(self.memory, self.network.start(self.memory, 1), None)
        return torch.log_softmax(logits.float(), -1)[:, 0].cpu().numpy()

    @torch.inference_mode()
    def step(self, parents: np.ndarray, previous: np.ndarray, row: np.ndarray, code: np.ndarray) -> np.ndarray:
        """Log-probabilities f64[C] of ``code`` behind hypothesis ``row``, whose last code is ``previous``.

        ``parents`` i64[q, G] are the hypotheses of the step before that the present ones continue, for the q queries
        of the tile that are not padding.
        """
        if self.cache is None:
            raise ValueError("the tile was not started")
        device = self.memory.mask.device
        whole = self._padded(parents).to(device)
        logits, self.cache = self.network.step(
            self.memory, self.cache.reorder(whole), self._padded(previous.reshape(-1, self.width)).to(device)
        )
        flat = logits.float().flatten(0, 1)
        norm = torch.logsumexp(flat, -1)
        rows, codes = torch.from_numpy(row).to(device), torch.from_numpy(code).to(device)
        return (flat[rows, codes] - norm[rows]).double().cpu().numpy()

    def _padded(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[np.minimum(np.arange(self.queries), len(values) - 1)])


def _tiles(network: DocidTransformer, memory: Memory, width: int) -> Iterator[_Tile]:
    """The queries in tiles, whose size depends on the width alone; the last one is padded.

    Two queries of 15 hypotheses share a call on a CPU: a third less time for each than alone, and a lone query waits a
    third longer. With four it would be half and twice.
    """
    device = device_of(network)
    size = max(1, 2 * tiles(device)[1] // width)
    for start in range(0, memory.size, size):
        index = torch.arange(start, start + size, device=device).clamp(max=memory.size - 1)
        with torch.inference_mode():
            yield _Tile(network, memory.rows(index), width)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` largest values, largest first; of equals the first."""
    places = np.arange(len(values))
    if len(values) > count:
        least = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _by_query(found: list[_Found], beam: _Beam) -> Iterator[Generated]:
    """The keys of every query, shorter ones first."""
    longest = beam.network.levels
    segments = len(beam.index.segments)
    query = np.concatenate([np.zeros(0, np.int64), *(step.query for step in found)])
    padded = (np.pad(s.codes, ((0, 0), (0, longest - s.codes.shape[1])), constant_values=NONE) for s in found)
    codes = np.concatenate([np.zeros((0, longest), np.int64), *padded])
    log_p = np.concatenate([np.zeros(0), *(step.log_p for step in found)])
    empty = np.zeros((segments, 0), np.int64)
    low = np.concatenate([empty, *(step.ranges.low for step in found)], axis=1)
    high = np.concatenate([empty, *(step.ranges.high for step in found)], axis=1)
    for i in range(beam.queries):
        mine = np.flatnonzero(query == i)
        ranges = Ranges(low[:, mine], high[:, mine], longest)
        yield Generated(codes[mine], log_p[mine], ranges, beam.first[i], int(beam.steps[i]), int(beam.rows[i]))
