"""Dividing queries into train, dev and test so that nothing leaks from one to another."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from mobula.data.duplicates import components, near_pairs
from mobula.data.records import Query

# A near-duplicate pair costs its member of the later split: what is measured on stays as published.
PRIORITY = ("test", "given", "dev", "train")


def divide(
    queries: Sequence[Query], shares: dict[str, float], rest: str, *, by_document: bool, threshold: float, seed: int
) -> dict[str, list[Query]]:
    """Divide queries into the splits of ``shares`` (in that order) and ``rest``.

    Near-duplicate queries stay together; with ``by_document`` so do queries that share a relevant document.
    Groups are drawn in random order; one that no longer fits into a split's share goes to the next, so large
    groups gather in ``rest``. Within a split, queries keep their order.
    """
    sharing = _sharing_a_document(queries) if by_document else ()
    groups = components(len(queries), itertools.chain(near_pairs([q.text for q in queries], threshold), sharing))
    quotas = {name: round(share * len(queries)) for name, share in shares.items()}
    chosen: dict[str, list[int]] = {name: [] for name in (*shares, rest)}
    for position in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[position]
        name = next((n for n, quota in quotas.items() if len(chosen[n]) + len(group) <= quota), rest)
        chosen[name].extend(group)
    return {name: [queries[i] for i in sorted(members)] for name, members in chosen.items()}


def drop_leaks(queries: dict[str, list[Query]], threshold: float) -> tuple[dict[str, list[Query]], int]:
    """Remove queries that have a near-duplicate in a split of higher priority; the rest and how many went."""
    order = sorted(queries, key=lambda name: PRIORITY.index(name) if name in PRIORITY else -1)
    flat = [(name, query) for name in order for query in queries[name]]
    dropped = {max(a, b) for a, b in near_pairs([q.text for _, q in flat], threshold) if flat[a][0] != flat[b][0]}
    kept: dict[str, list[Query]] = {name: [] for name in queries}
    for position, (name, query) in enumerate(flat):
        if position not in dropped:
            kept[name].append(query)
    return kept, len(dropped)


def _sharing_a_document(queries: Sequence[Query]) -> Iterator[tuple[int, int]]:
    asking: dict[str, list[int]] = defaultdict(list)
    for position, query in enumerate(queries):
        for document in query.gold:
            asking[document].append(position)
    for positions in asking.values():
        yield from ((positions[0], other) for other in positions[1:])
