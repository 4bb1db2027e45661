"""Identical and near-duplicate texts.

Two texts are identical if their normalised forms are equal, near-duplicates if the Jaccard similarity of
their word sets reaches a threshold.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Words a pair's prefixes must share: with more, fewer pairs are compared whole, but longer prefixes are indexed.
SHARED = 5
# Entries of inverted lists, or words of pairs, that are looked at together: some ten megabytes an array.
BLOCK = 1_000_000
_WORD = re.compile(r"[^\W_]+")


def normalise(text: str) -> str:
    """Lower case, alphanumeric runs joined by single spaces."""
    return " ".join(split_words(text))


def split_words(text: str) -> list[str]:
    """The words of a text's normalised form."""
    return _WORD.findall(text.lower())


def identical(texts: Sequence[str]) -> list[list[int]]:
    """Groups (two or more positions) of texts whose normalised forms are equal and not empty."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(texts):
        positions[normalise(text)].append(position)
    return [group for form, group in positions.items() if form and len(group) > 1]


def near_pairs(
    texts: Sequence[str], threshold: float, words: Callable[[str], Iterable[str]] = split_words
) -> Iterator[tuple[int, int]]:
    """Every pair (i, j), i != j, whose word sets have Jaccard similarity >= threshold, once each.

    Exact, by prefix filtering: of two sets of similarity t, the smaller one no larger than the other one's n
    words, the n - ceil(t n) + k words that come first in order of rarity share at least k (Chaudhuri et al.,
    ICDE 2006; with k > 1: Wang et al., SIGMOD 2012). ``words`` cuts a text.

    Candidates are counted in blocks, so memory grows with the words of the texts alone. Time grows with the squares of
    the numbers of texts that have a prefix word in common.
    """
    sets = WordSets.of(texts, words)
    # The small constant keeps a product such as 0.7 * 10 = 7.000000000000001 from being rounded up.
    needed = np.ceil(threshold * sets.sizes - 1e-9).astype(np.int64)
    for larger, smaller in _candidates(sets, needed):
        for part in _blocks(sets.sizes[larger] + sets.sizes[smaller]):
            a, b = larger[part], smaller[part]
            common = sets.common(a, b)
            near = common / np.maximum(sets.sizes[a] + sets.sizes[b] - common, 1) >= threshold
            yield from zip(sets.order[b[near]].tolist(), sets.order[a[near]].tolist(), strict=True)


@dataclass(frozen=True)
class WordSets:
    """The word sets of N texts, smallest first: ``order`` i64[N] says which text each is of, ``sizes`` i64[N] its size.

    Words are numbers 0..V-1, rarest first. Set s is ``words[start[s] : start[s + 1]]``, ascending.
    """

    order: np.ndarray
    sizes: np.ndarray
    start: np.ndarray
    words: np.ndarray
    vocabulary: int

    @classmethod
    def of(cls, texts: Sequence[str], words: Callable[[str], Iterable[str]]) -> WordSets:
        """The sets of ``texts`` as ``words`` cuts them."""
        number: dict[str, int] = {}
        rows = []
        for text in texts:
            found = {number.setdefault(word, len(number)) for word in words(text)}
            rows.append(np.fromiter(found, np.int64, len(found)))
        sizes = np.array([len(row) for row in rows], np.int64)
        order = np.argsort(sizes, kind="stable")
        every = np.concatenate([rows[i] for i in order]) if rows else np.zeros(0, np.int64)
        rarity = np.argsort(np.argsort(np.bincount(every, minlength=len(number)), kind="stable"))
        width = max(1, len(number))
        ranked = np.sort(np.repeat(np.arange(len(rows)), sizes[order]) * width + rarity[every]) % width
        return cls(order, sizes[order], np.append(0, np.cumsum(sizes[order])), ranked, width)

    def common(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How many words sets ``a`` and ``b`` (i64[m]) have in common, i64[m]."""
        keys = [owner * self.vocabulary + self.words[place] for owner, place in map(self._places, (a, b))]
        every = np.sort(np.concatenate(keys))
        twice = every[1:][every[1:] == every[:-1]]
        return np.bincount(twice // self.vocabulary, minlength=len(a))

    def _places(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ranges(self.start[sets], self.sizes[sets])


def _candidates(sets: WordSets, needed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (larger, smaller) of sets i64[m] that share enough words of their prefixes, block by block.

    ``needed`` i64[N] words of a set must be another's too if the two are similar and the other no larger.
    """
    shared = np.minimum(SHARED, needed)
    count = max(1, len(sets.sizes))
    owner, place = ranges(sets.start[:-1], sets.sizes - needed + shared)
    # The inverted lists, one after the other: sets in order of size under each word of their prefixes.
    lists = np.sort(sets.words[place] * count + owner)
    word, owner = np.divmod(lists, count)
    # What stands before a set in a list is no larger than it; beginning where it is large enough.
    begin = np.searchsorted(lists, word * count + np.searchsorted(sets.sizes, needed)[owner])
    length = np.arange(len(lists)) - begin
    by_owner = np.argsort(owner, kind="stable")
    owner, begin, length = owner[by_owner], begin[by_owner], length[by_owner]
    for part in _blocks(np.bincount(owner, length, len(sets.sizes)).astype(np.int64)):
        entries = slice(*np.searchsorted(owner, [part.start, part.stop]))
        entry, place = ranges(begin[entries], length[entries])
        pairs, counts = np.unique(owner[entries][entry] * count + lists[place] % count, return_counts=True)
        larger, smaller = np.divmod(pairs, count)
        enough = counts >= shared[larger]
        yield larger[enough], smaller[enough]


def ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of each range [start, start + length), i64[m], behind the number of their range."""
    owner = np.repeat(np.arange(len(start)), length)
    return owner, np.arange(len(owner)) + np.repeat(start - (np.cumsum(length) - length), length)


def _blocks(costs: np.ndarray) -> Iterator[slice]:
    """Slices of items that cost BLOCK together, or little more than one that costs more."""
    if not len(costs):
        return
    edges = np.flatnonzero(np.diff(np.cumsum(costs) // BLOCK)) + 1
    for begin, end in itertools.pairwise([0, *edges.tolist(), len(costs)]):
        yield slice(begin, end)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a & b| / |a | b|; 0 for two empty sets."""
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of ``count`` nodes, each sorted, in order of their first node."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members: dict[int, list[int]] = defaultdict(list)
    for node in range(count):
        members[root(node)].append(node)
    return list(members.values())
