"""The prefix trie of the live codes of a corpus, for left-to-right decoding (GENRE, De Cao et al. 2021)."""

from __future__ import annotations

import numpy as np

from mobula.retrieval.docids.table import DocidTable

OUTSIDE = -1  # the node of a prefix that no live document has


class Trie:
    """Distinct live codes as a trie in CSR arrays.

    Nodes are numbered level by level, node 0 being the root; edges are sorted by (node, code):
    ``child_ptr`` i64[nodes + 1], ``child_code`` i32[edges], ``child_node`` i64[edges]. Documents of equal
    code hang from one leaf. Everything works on arrays of nodes of any shape, so a step over all beams of all
    requests is a few numpy calls.
    """

    def __init__(self, table: DocidTable) -> None:
        self.levels, self.width = table.levels, table.width
        rows = np.flatnonzero(table.live)
        codes = table.codes[rows]
        # Stable, so documents of a leaf stay in corpus order.
        order = np.lexsort(codes.T[::-1])
        rows, codes = rows[order], codes[order]
        parent = np.zeros(len(codes), np.int64)
        fresh = np.zeros(len(codes), bool)
        fresh[:1] = True
        edge_parent, edge_code = [], []
        nodes = 1
        for level in range(self.levels):
            fresh[1:] |= codes[1:, level] != codes[:-1, level]
            edge_parent.append(parent[fresh])
            edge_code.append(codes[fresh, level])
            parent = nodes + np.cumsum(fresh) - 1
            nodes += int(fresh.sum())
        start = np.concatenate(edge_parent)
        self.child_code = np.concatenate(edge_code).astype(np.int32)
        self.child_node = np.arange(1, nodes, dtype=np.int64)
        self.child_ptr = np.searchsorted(start, np.arange(nodes + 1)).astype(np.int64)
        self._edge_key = start * self.width + self.child_code
        self._first_leaf = nodes - int(fresh.sum())
        self._leaf_rows = np.split(rows, np.flatnonzero(fresh)[1:])

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.child_ptr) - 1

    def root(self, *shape: int) -> np.ndarray:
        """The root for each of ``shape`` beams, i64."""
        return np.zeros(shape, np.int64)

    def mask(self, nodes: np.ndarray) -> np.ndarray:
        """Codes bool[..., K] that continue ``nodes`` i64[...]; none after a leaf or outside the trie."""
        flat = nodes.reshape(-1)
        inside = flat != OUTSIDE
        begin = np.where(inside, self.child_ptr[flat], 0)
        length = np.where(inside, self.child_ptr[flat + 1], 0) - begin
        owner = np.repeat(np.arange(len(flat)), length)
        edge = np.arange(len(owner)) + np.repeat(begin - (np.cumsum(length) - length), length)
        out = np.zeros((len(flat), self.width), bool)
        out[owner, self.child_code[edge]] = True
        return out.reshape(*nodes.shape, self.width)

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The child i64[...] of ``nodes`` i64[...] by ``codes`` i64[...]; OUTSIDE (-1) where there is none."""
        if not len(self._edge_key):
            return np.full(nodes.shape, OUTSIDE, np.int64)
        wanted = nodes * self.width + codes
        edge = np.minimum(np.searchsorted(self._edge_key, wanted), len(self._edge_key) - 1)
        exists = (nodes != OUTSIDE) & (codes >= 0) & (codes < self.width) & (self._edge_key[edge] == wanted)
        return np.where(exists, self.child_node[edge], OUTSIDE)

    def documents(self, leaf: int) -> np.ndarray:
        """Table rows of the documents at a leaf, in corpus order; none for any other node."""
        if leaf < self._first_leaf:
            return np.zeros(0, np.int64)
        return self._leaf_rows[leaf - self._first_leaf]
