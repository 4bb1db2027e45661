"""The n-gram index against lists of Python tuples."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest

from mobula.retrieval.ngrams.index import MOST_SEGMENTS, NgramIndex, is_key, sort_suffixes
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Streams

DEPTH = 5


def corpus(documents: int, codes: int, seed: int = 0, longest: int = 30) -> Streams:
    """Random documents, some with a title, some empty."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(documents):
        title = random.integers(FIRST, codes, random.integers(0, 4))
        text = random.integers(FIRST, codes, random.integers(0, longest))
        head = [TITLE, *title, TITLE_END] if len(title) else []
        rows.append(np.array([*head, *text, BREAK], np.int32))
    return Streams.of(rows)


def parts(streams: Streams, sizes: list[int]) -> list[Streams]:
    return [streams.select(range(a, b)) for a, b in itertools.pairwise(np.cumsum([0, *sizes]))]


def brute(streams: Streams) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Places of every n-gram that may be a key, by the definition."""
    places = defaultdict(list)
    for document in range(len(streams)):
        row = streams.row(document).tolist()
        for begin in range(len(row)):
            for end in range(begin + 1, min(len(row), begin + DEPTH) + 1):
                ngram = tuple(row[begin:end])
                tokens = ngram[1:-1] if ngram[0] == TITLE and ngram[-1] == TITLE_END else ngram
                if tokens and min(tokens) >= FIRST:
                    places[ngram].append((document, begin))
    return dict(places)


@pytest.mark.parametrize("codes", [6, 40, 3000])
def test_counts_and_places_equal_brute_force(codes: int) -> None:
    streams = corpus(60, codes)
    index = NgramIndex.build(streams, DEPTH)
    places = brute(streams)
    ngrams = sorted(places)
    assert index.count(ngrams).tolist() == [len(places[ngram]) for ngram in ngrams]
    for ngram in ngrams[:: max(1, len(ngrams) // 200)]:
        assert index.locate(ngram, 10_000) == places[ngram]
        assert index.locate(ngram, 2) == places[ngram][:2]
    absent = [ngram for ngram in {(n[0], *n) for n in ngrams} if ngram not in places and len(ngram) <= DEPTH]
    assert index.count(absent).tolist() == [0] * len(absent)


@pytest.mark.parametrize("codes", [6, 40])
def test_successors_equal_brute_force(codes: int) -> None:
    streams = corpus(60, codes)
    index = NgramIndex.build(streams, DEPTH)
    places = brute(streams)
    for depth in range(1, DEPTH):
        prefixes = sorted({n[:depth] for n in places if len(n) > depth})
        # What may follow: tokens after tokens; after TITLE also the end, once there is something to end.
        expected = {prefix: set() for prefix in prefixes}
        for ngram in places:
            if len(ngram) > depth:
                expected[ngram[:depth]].add(ngram[depth])
        for document in range(len(streams)):
            row = streams.row(document).tolist()
            if row[0] == TITLE and depth < len(row) and tuple(row[:depth]) in expected and TITLE_END not in row[:depth]:
                expected[tuple(row[:depth])].add(row[depth])
        ranges = index.find(np.array(prefixes, np.int32))
        row, code = index.successors(ranges, np.array([prefix[0] == TITLE for prefix in prefixes]))
        found = {prefix: code[row == i].tolist() for i, prefix in enumerate(prefixes)}
        assert found == {prefix: sorted(codes) for prefix, codes in expected.items()}


def test_index_versions() -> None:
    """Segmented suffix arrays equal one array, also after they were merged; the old index stays as it was (trap 9)."""
    streams = corpus(90, 25)
    ngrams = sorted(brute(streams))
    whole = NgramIndex.build(streams, DEPTH)
    sizes = [10, 1, 9, 20, 5, 5, 10, 10, 10, 5, 5]
    grown = NgramIndex.build(parts(streams, sizes)[0], DEPTH)
    seen = sizes[0]
    for part, size in zip(parts(streams, sizes)[1:], sizes[1:], strict=True):
        before = grown
        frozen = before.count(ngrams)
        grown = grown.add(part)
        seen += size
        fresh = NgramIndex.build(streams.select(range(seen)), DEPTH)
        assert np.array_equal(grown.count(ngrams), fresh.count(ngrams))
        assert np.array_equal(before.count(ngrams), frozen)
        assert len(grown.segments) <= MOST_SEGMENTS
    assert len(grown.segments) == 3
    for ngram in ngrams[::7]:
        assert grown.locate(ngram, 5) == whole.locate(ngram, 5)
    for depth in range(1, DEPTH):
        prefixes = np.array(sorted({n[:depth] for n in ngrams if len(n) > depth}), np.int32)
        titles = prefixes[:, 0] == TITLE
        for a, b in zip(
            grown.successors(grown.find(prefixes), titles), whole.successors(whole.find(prefixes), titles), strict=True
        ):
            assert np.array_equal(a, b)
    assert np.array_equal(grown.frequencies, whole.frequencies)
    assert grown.tokens == whole.tokens == int((streams.codes >= FIRST).sum())
    for name in ("pair", "document", "code", "count", "first"):
        assert np.array_equal(getattr(grown.postings, name), getattr(whole.postings, name))


def test_ngram_never_crosses_documents() -> None:
    """Trap 11: nor from a title into the text, nor over a token that a limited vocabulary lacks."""
    rows = [[TITLE, 4, 5, TITLE_END, 6, 7, BREAK], [TITLE, 8, TITLE_END, 9, BREAK, 10, BREAK]]
    index = NgramIndex.build(Streams.of([np.array(row, np.int32) for row in rows]), DEPTH)
    crossing = [(7, 8), (7, BREAK), (7, BREAK, TITLE, 8), (5, TITLE_END, 6), (5, 6), (9, BREAK, 10), (9, 10), (BREAK,)]
    assert index.count(crossing).tolist() == [0] * len(crossing)
    inside = [(4, 5), (6, 7), (8,), (9,), (10,), (4,)]
    assert index.count(inside).tolist() == [1] * len(inside)
    ranges = index.find(np.array([[5], [7], [8], [9]], np.int32))
    assert [array.tolist() for array in index.successors(ranges, np.zeros(4, bool))] == [[], []]


def test_title_keys_bounded() -> None:
    """Trap 11: a title key is the whole title; its end alone, or its beginning, is none."""
    rows = [[TITLE, 4, 5, TITLE_END, 6, BREAK], [TITLE, 5, TITLE_END, 4, BREAK], [TITLE, 4, 5, 6, TITLE_END, BREAK]]
    index = NgramIndex.build(Streams.of([np.array(row, np.int32) for row in rows]), DEPTH)
    assert index.locate((TITLE, 4, 5, TITLE_END), 9) == [(0, 0)]
    assert index.locate((TITLE, 5, TITLE_END), 9) == [(1, 0)]
    partial = [(TITLE,), (TITLE, 4), (TITLE, 4, 5), (5, TITLE_END), (TITLE, TITLE_END), (TITLE_END,)]
    assert index.count(partial).tolist() == [0] * len(partial)
    assert not any(is_key(ngram) for ngram in partial)
    begun = index.find(np.array([[TITLE, 4, 5]], np.int32))
    assert index.successors(begun, np.array([True]))[1].tolist() == [TITLE_END, 6]
    plain = index.find(np.array([[4, 5]], np.int32))
    assert index.successors(plain, np.array([False]))[1].tolist() == [6]


@pytest.mark.parametrize(("codes", "depth"), [(4, 1), (4, 40), (5000, 5), (40_000, 9), (7, 64)])
def test_suffixes_are_sorted(codes: int, depth: int) -> None:
    """With few codes one number holds many of them, with many codes the ranks are doubled."""
    stream = np.random.default_rng(1).integers(0, codes, 500).astype(np.int32)
    stream[100:200] = stream[:100]  # a long repeat
    order = sort_suffixes(stream, depth)
    padded = [*stream.tolist(), *[0] * depth]
    windows = [padded[i : i + depth] for i in order.tolist()]
    assert windows == sorted(windows)
    assert sorted(order.tolist()) == list(range(500))


def test_empty_streams_and_unknown_codes() -> None:
    index = NgramIndex.build(Streams.of([np.array([BREAK], np.int32)]), DEPTH)
    assert index.count([(5,), (5, 6)]).tolist() == [0, 0]
    assert index.tokens == 0
    assert index.add(Streams.of([])) is index
    grown = index.add(Streams.of([np.array([9, 8, BREAK], np.int32)]))
    assert grown.count([(9, 8), (8,), (5,)]).tolist() == [1, 1, 0]
