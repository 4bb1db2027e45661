"""Identical and near-duplicate texts.

Two texts are identical if their normalised forms are equal, near-duplicates if the Jaccard similarity of
their word sets reaches a threshold.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

# Words a pair's prefixes must share: with more, fewer pairs are compared whole, but longer prefixes are indexed.
SHARED = 5
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
    """
    sets = [frozenset(words(text)) for text in texts]
    frequency = Counter(word for words_of_text in sets for word in words_of_text)
    rank = {word: position for position, (word, _) in enumerate(sorted(frequency.items(), key=lambda f: (f[1], f[0])))}
    index: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        # The small constant keeps a product such as 0.7 * 10 = 7.000000000000001 from being rounded up.
        needed = math.ceil(threshold * len(sets[i]) - 1e-9)
        shared = min(SHARED, needed)
        prefix = sorted(sets[i], key=rank.__getitem__)[: len(sets[i]) - needed + shared]
        counts = Counter(j for word in prefix for j in index[word])
        for j in sorted(j for j, count in counts.items() if count >= shared):
            if len(sets[j]) >= needed and jaccard(sets[i], sets[j]) >= threshold:
                yield j, i
        for word in prefix:
            index[word].append(i)


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
