"""Docids that are paths in a tree of k-means clusters (family ``hkmeans``; DSI, Tay et al. 2022).

A code is branch, ..., branch, leaf index, END, END, ... All levels share one alphabet: 0 is END, 1..B the
branches, B+1.. the leaf indices. A leaf has twice ``hk.leaf`` indices, so that documents which arrive later
find room, and indices of documents that left are given again; documents beyond share the last one. Nodes are
numbered breadth first, children of a node in a row: ``first[n]`` is the first child (-1 for a leaf),
``children[n]`` their number, ``centroid[n]`` the centroid that draws points to a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence, Set
from functools import lru_cache

import numpy as np

from mobula.data.records import Document
from mobula.retrieval.docids.quantised import kmeans, nearest
from mobula.retrieval.docids.settings import CodeConfig

END = 0


class FreeIndices:
    """Hands out indices 0, 1, ... for each key, leaving out those that ``used`` gives for it."""

    def __init__(self, used: Callable[[tuple[int, ...]], Set[int]]) -> None:
        self.used, self._next = lru_cache(None)(used), Counter[tuple[int, ...]]()

    def take(self, key: tuple[int, ...]) -> int:
        """The smallest index of ``key`` that is neither used nor handed out already."""
        used = self.used(key)
        while self._next[key] in used:
            self._next[key] += 1
        self._next[key] += 1
        return self._next[key] - 1


def fit(config: CodeConfig, points: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sizes i32[L] and the tree over points f64[N, D].

    A node is split while it holds more than ``hk.leaf`` points, they differ, and the path leaves room for the
    leaf index and END.
    """
    members = [np.arange(len(points))]
    depth, first, children = [0], [-1], [0]
    centroid = [points.mean(0)]
    node = 0
    while node < len(members):
        groups = _split(config, points, members[node], depth[node], seed + node)
        if groups:
            first[node], children[node] = len(members), len(groups)
        for group, mean in groups:
            members.append(group)
            depth.append(depth[node] + 1)
            first.append(-1)
            children.append(0)
            centroid.append(mean)
        node += 1
    size = 1 + config.hk.branch + 2 * config.hk.leaf
    arrays: dict[str, np.ndarray] = {
        "centroid": np.stack(centroid).astype(np.float32),
        "first": np.array(first, np.int64),
        "children": np.array(children, np.int64),
        "branch": np.array([config.hk.branch], np.int64),
    }
    return np.full(config.levels, size, np.int32), arrays


def paths(arrays: dict[str, np.ndarray], levels: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Branches i32[N, L] from the root to a leaf, padded with END, and their number i64[N]."""
    first, children, centroid = arrays["first"], arrays["children"], arrays["centroid"]
    codes = np.full((len(points), levels), END, np.int32)
    node = np.zeros(len(points), np.int64)
    lengths = np.zeros(len(points), np.int64)
    for level in range(levels):
        inner = np.flatnonzero(first[node] >= 0)
        if not len(inner):
            break
        for parent in np.unique(node[inner]):
            rows = inner[node[inner] == parent]
            start = first[parent]
            chosen = nearest(points[rows], centroid[start : start + children[parent]])
            codes[rows, level] = 1 + chosen
            node[rows] = start + chosen
        lengths[inner] += 1
    return codes, lengths


def encode(
    arrays: dict[str, np.ndarray],
    levels: int,
    size: int,
    documents: Sequence[Document],
    points: np.ndarray,
    taken: Container[bytes],
) -> np.ndarray:
    """Codes i32[N, L]; documents get the free leaf indices in the order of their ids.

    An index is free if its code is not in ``taken``, the bytes of codes.
    """
    codes, lengths = paths(arrays, levels, points)
    branch = int(arrays["branch"][0])
    last = size - 1 - branch - 1
    free = FreeIndices(lambda path: _occupied(path, levels, branch, last, taken))
    for row in sorted(range(len(documents)), key=lambda i: documents[i].id):
        path = tuple(codes[row, : lengths[row]].tolist())
        codes[row, lengths[row]] = branch + 1 + min(free.take(path), last)
    return codes


def reconstruct(arrays: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """The centroid f32[N, D] of the leaf each code i32[N, L] leads to."""
    first, branch = arrays["first"], int(arrays["branch"][0])
    node = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):
        code = codes[:, level]
        inner = (code > END) & (code <= branch) & (first[node] >= 0)
        node[inner] = first[node[inner]] + code[inner] - 1
    return arrays["centroid"][node]


def _split(
    config: CodeConfig, points: np.ndarray, members: np.ndarray, depth: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The children of a node, each with its members i64[m] and centroid f32[D]; none if it stays a leaf."""
    if len(members) <= config.hk.leaf or depth + 3 > config.levels:
        return []
    own = points[members]
    if np.all(own == own[0]):
        return []
    centroids = kmeans(own, min(config.hk.branch, len(members)), config.iterations, seed)
    chosen = nearest(own, centroids)
    groups = [(members[chosen == k], mean) for k, mean in enumerate(centroids)]
    groups = [group for group in groups if len(group[0])]
    return groups if len(groups) > 1 else []


def _occupied(path: tuple[int, ...], levels: int, branch: int, last: int, taken: Container[bytes]) -> set[int]:
    """The indices 0..``last`` in use in the leaf at the end of ``path``."""
    codes = np.full((last + 1, levels), END, np.int32)
    codes[:, : len(path)] = path
    codes[:, len(path)] = branch + 1 + np.arange(last + 1)
    return {index for index, code in enumerate(codes) if code.tobytes() in taken}
