"""Where n-grams occur: suffix arrays over streams of codes, one segment for each batch of documents.

Shapes: n positions, V codes, N documents, S segments, H hypotheses (n-grams that are looked up together). A position
counts through the streams of all documents in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Streams

MOST_SEGMENTS = 8


@dataclass(frozen=True, eq=False)
class Ranges:
    """Where H n-grams of ``depth`` codes stand in each segment's suffix array: from ``low`` to ``high`` i64[S, H].

    An n-gram that does not occur has an empty range.
    """

    low: np.ndarray
    high: np.ndarray
    depth: int

    @property
    def counts(self) -> np.ndarray:
        """Occurrences i64[H], over all segments."""
        return (self.high - self.low).sum(0)

    def rows(self, index: np.ndarray, alive: np.ndarray | None = None) -> Ranges:
        """The ranges of the n-grams at ``index``; where ``alive`` is False they are empty."""
        low, high = self.low[:, index], self.high[:, index]
        return Ranges(low, high if alive is None else np.where(alive, high, low), self.depth)


@dataclass(frozen=True, eq=False)
class Segment:
    """The suffix array of some documents' streams.

    ``codes`` i32[n + depth] ends in BREAKs; ``suffixes`` i32[n] are positions in the order of the codes that begin
    there, of at least ``depth`` of them; ``shared`` u8[n] counts the leading codes that a suffix has in common with the
    one before it; ``heads`` i64[V + 1] says where the suffixes of each first code begin.
    """

    codes: np.ndarray
    suffixes: np.ndarray
    shared: np.ndarray
    heads: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray, depth: int) -> Segment:
        """Sort the suffixes of ``codes`` i32[n] by their first ``depth`` codes: the longest n-gram looked up."""
        padded = np.concatenate([codes, np.full(depth, BREAK, np.int32)])
        suffixes = sort_suffixes(codes, depth)
        shared = np.zeros(len(codes), np.uint8)
        equal = np.ones(max(0, len(codes) - 1), bool)
        for offset in range(depth):
            here = padded[suffixes + offset]
            equal &= here[1:] == here[:-1]
            shared[1:] += equal
        heads = np.concatenate([[0], np.cumsum(np.bincount(codes))])
        return cls(padded, suffixes.astype(np.int32), shared, heads)

    def __len__(self) -> int:
        """Positions."""
        return len(self.suffixes)

    @cached_property
    def pairs(self) -> np.ndarray:
        """Where suffixes with another pair of first codes begin."""
        return np.flatnonzero(self.shared < 2)

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return sum(a.nbytes for a in (self.codes, self.suffixes, self.shared, self.heads, self.pairs))

    def narrow(self, low: np.ndarray, high: np.ndarray, codes: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The ranges within i64[H] ``low`` to ``high`` whose suffixes have ``codes`` i32[H] at ``depth``."""
        if depth == 0:
            last = len(self.heads) - 1
            return self.heads[np.minimum(codes, last)], self.heads[np.minimum(codes + 1, last)]
        # Two binary searches side by side, for the code and for the one after it.
        wanted = np.stack([codes, codes + 1])
        left, right = np.stack([low, low]), np.stack([high, high])
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (left + right) >> 1
            codes = self.codes[self.suffixes[np.minimum(middle, len(self) - 1)] + depth]
            above = (codes < wanted) & (left < right)
            left, right = np.where(above, middle + 1, left), np.where(above, right, middle)
        return left[0], left[1]

    def successors(self, low: np.ndarray, high: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i64[C] and code i32[C] of every code that follows an n-gram with a range i64[H], each once, sorted.

        Suffixes of a range are sorted, so those that bring another code are known from ``shared``: no code is looked at
        twice. A frequent single code has many suffixes and far fewer successors, hence ``pairs``.
        """
        if depth == 1:
            row, entry = ragged(np.searchsorted(self.pairs, low), np.searchsorted(self.pairs, high))
            entry = self.pairs[entry]
        else:
            row, entry = ragged(low, high)
            another = (self.shared[entry] <= depth) | (entry == low[row])
            row, entry = row[another], entry[another]
        return row, self.codes[self.suffixes[entry] + depth]


@dataclass(frozen=True, eq=False)
class Postings:
    """Which codes each document holds: P pairs of a document and a code, sorted.

    ``pair`` i32[n] names the pair at every position; ``document``, ``code`` and ``count`` i32[P] describe the pairs;
    ``first`` i64[N] is each document's first pair.
    """

    pair: np.ndarray
    document: np.ndarray
    code: np.ndarray
    count: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, streams: Streams) -> Postings:
        """The postings of documents, none of them with an empty stream."""
        owner = np.repeat(np.arange(len(streams)), streams.lengths)
        width = int(streams.codes.max(initial=0)) + 1
        keys, pair, count = np.unique(owner * width + streams.codes, return_inverse=True, return_counts=True)
        document, code = np.divmod(keys, width)
        first = np.searchsorted(document, np.arange(len(streams)))
        narrow = [array.astype(np.int32) for array in (pair, document, code, count)]
        return cls(narrow[0], narrow[1], narrow[2], narrow[3], first)

    def concat(self, other: Postings) -> Postings:
        """With the documents of ``other`` behind these."""
        pairs, documents = len(self.document), len(self.first)
        return Postings(
            np.concatenate([self.pair, other.pair + np.int32(pairs)]),
            np.concatenate([self.document, other.document + np.int32(documents)]),
            np.concatenate([self.code, other.code]),
            np.concatenate([self.count, other.count]),
            np.concatenate([self.first, other.first + pairs]),
        )

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return sum(a.nbytes for a in (self.pair, self.document, self.code, self.count, self.first))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """For each document f64[N] the sum of ``values`` f64[V] over the different codes it holds."""
        return np.add.reduceat(values[self.code], self.first)


@dataclass(frozen=True, eq=False)
class NgramIndex:
    """The n-grams of a corpus of up to ``depth`` codes. Adding documents gives a new index; the old one stays valid."""

    segments: tuple[Segment, ...]
    postings: Postings
    lengths: np.ndarray
    depth: int

    @classmethod
    def build(cls, streams: Streams, depth: int) -> NgramIndex:
        """Index documents in one segment; there is at least one, and every stream ends with a BREAK."""
        return cls((Segment.build(streams.codes, depth),), Postings.of(streams), streams.lengths, depth)

    def add(self, streams: Streams) -> NgramIndex:
        """With further documents in a segment of their own; more than 8 segments become one."""
        if not len(streams):
            return self
        segments = (*self.segments, Segment.build(streams.codes, self.depth))
        postings = self.postings.concat(Postings.of(streams))
        lengths = np.concatenate([self.lengths, streams.lengths])
        if len(segments) > MOST_SEGMENTS:
            segments = (Segment.build(_codes(segments, self.depth), self.depth),)
        return NgramIndex(segments, postings, lengths, self.depth)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def streams(self) -> Streams:
        """What was indexed."""
        return Streams(self.codes, self.lengths)

    @cached_property
    def codes(self) -> np.ndarray:
        """The code at every position, i32[n]."""
        return _codes(self.segments, self.depth)

    @cached_property
    def offsets(self) -> np.ndarray:
        """First position of every segment, i64[S]."""
        return np.cumsum([0, *map(len, self.segments)])[:-1]

    @cached_property
    def frequencies(self) -> np.ndarray:
        """Occurrences i64[V'] of every code; V' - 1 is the largest."""
        return np.bincount(self.codes)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, marks left out."""
        return int(self.frequencies[FIRST:].sum())

    @property
    def bytes(self) -> int:
        """Size of everything a search reads."""
        return sum(segment.bytes for segment in self.segments) + self.postings.bytes

    def root(self, hypotheses: int) -> Ranges:
        """Ranges of empty n-grams, which everything follows."""
        sizes = np.array([len(segment) for segment in self.segments])
        high = np.repeat(sizes[:, None], hypotheses, axis=1)
        return Ranges(np.zeros_like(high), high, 0)

    def extend(self, ranges: Ranges, codes: np.ndarray) -> Ranges:
        """The ranges of H n-grams with one more code each."""
        extended = [
            segment.narrow(low, high, codes, ranges.depth)
            for segment, low, high in zip(self.segments, ranges.low, ranges.high, strict=True)
        ]
        return Ranges(np.stack([f[0] for f in extended]), np.stack([f[1] for f in extended]), ranges.depth + 1)

    def successors(self, ranges: Ranges, titles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row i64[C] and code i32[C] of every way to go on with H n-grams of at least one code, sorted, each once.

        A TITLE_END follows only those that ``titles`` bool[H] says began with TITLE; other marks follow nothing.
        Enumerating them costs less than testing the model's 64 best codes for existence: 0.3 to 6 ms for 240
        hypotheses over 2 million tokens, against 6 to 13 ms and another 15 ms to find the 64 (one busy core).
        """
        by_segment = [
            segment.successors(low, high, ranges.depth)
            for segment, low, high in zip(self.segments, ranges.low, ranges.high, strict=True)
        ]
        row, code = (np.concatenate([f[i] for f in by_segment]) for i in (0, 1))
        if len(by_segment) > 1:
            width = len(self.frequencies)
            row, code = np.divmod(np.unique(row * width + code), width)
        legal = (code >= FIRST) | ((code == TITLE_END) & titles[row])
        return row[legal], code[legal]

    def find(self, ngrams: np.ndarray) -> Ranges:
        """Ranges of n-grams i32[H, m], all of m codes, whether or not they could be keys."""
        ranges = self.root(len(ngrams))
        for column in ngrams.T:
            ranges = self.extend(ranges, column)
        return ranges

    def count(self, ngrams: Sequence[Sequence[int]]) -> np.ndarray:
        """Occurrences i64[H] of n-grams; those that :func:`is_key` refuses have none."""
        counts = np.zeros(len(ngrams), np.int64)
        for length in {len(ngram) for ngram in ngrams}:
            rows = [i for i, ngram in enumerate(ngrams) if len(ngram) == length and is_key(ngram)]
            counts[rows] = self.find(np.array([ngrams[i] for i in rows], np.int32).reshape(-1, length)).counts
        return counts

    def locate(self, ngram: Sequence[int], limit: int) -> list[tuple[int, int]]:
        """The first ``limit`` occurrences as (document row, position in its stream)."""
        if not is_key(ngram):
            return []
        _, positions = self.positions(self.find(np.array([ngram], np.int32)))
        starts = self.streams.starts
        positions = np.sort(positions)[:limit]
        rows = np.searchsorted(starts, positions, side="right") - 1
        return list(zip(rows.tolist(), (positions - starts[rows]).tolist(), strict=True))

    def positions(self, ranges: Ranges) -> tuple[np.ndarray, np.ndarray]:
        """Row i64[M] and position i64[M] of every occurrence of H n-grams, sorted."""
        rows, positions = [], []
        for segment, low, high, offset in zip(self.segments, ranges.low, ranges.high, self.offsets, strict=True):
            row, entry = ragged(low, high)
            rows.append(row)
            positions.append(segment.suffixes[entry] + offset)
        row, position = np.concatenate(rows), np.concatenate(positions)
        order = np.argsort(row * len(self.codes) + position)
        return row[order], position[order]


def is_key(ngram: Sequence[int]) -> bool:
    """Whether an n-gram may be a key: tokens alone, or a whole title with both its marks."""
    if ngram and ngram[0] == TITLE:
        ngram = ngram[1:-1] if ngram[-1] == TITLE_END else ()
    return len(ngram) > 0 and all(code >= FIRST for code in ngram)


def sort_suffixes(codes: np.ndarray, depth: int) -> np.ndarray:
    """Positions i64[n] of codes i32[n] (at least 0), sorted by at least ``depth`` codes that begin there.

    Prefix doubling (Manber and Myers, 1993), begun with as many codes as fit into one 63-bit number.
    """
    bits = max(1, int(codes.max(initial=0)).bit_length())
    known = min(depth, 63 // bits)
    padded = np.concatenate([codes, np.full(known, BREAK, codes.dtype)]).astype(np.int64)
    keys = np.zeros(len(codes), np.int64)
    for offset in range(known):
        keys = (keys << bits) | padded[offset : offset + len(codes)]
    while True:
        order = np.argsort(keys, kind="stable")
        if known >= depth:
            return order
        ranks = np.zeros(len(codes), np.int64)
        ranks[order[1:]] = np.cumsum(keys[order[1:]] != keys[order[:-1]])
        if ranks.max(initial=0) == len(codes) - 1:
            return order
        # The rank of what follows; behind the end it is below all ranks.
        following = np.zeros(len(codes), np.int64)
        following[: max(0, len(codes) - known)] = ranks[known:] + 1
        keys = ranks * (len(codes) + 1) + following
        known *= 2


def ragged(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and position of everything in the ranges i64[H] from ``low`` to ``high``, row by row."""
    sizes = high - low
    row = np.repeat(np.arange(len(sizes)), sizes)
    return row, np.arange(len(row)) + (low - (np.cumsum(sizes) - sizes))[row]


def _codes(segments: Sequence[Segment], depth: int) -> np.ndarray:
    return np.concatenate([segment.codes[: len(segment.codes) - depth] for segment in segments])
