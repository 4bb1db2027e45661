"""The prefix trie of the live codes of a corpus, for left-to-right decoding (GENRE, De Cao et al. 2021)."""

from __future__ import annotations

import numpy as np

from mobula.retrieval.docids.growing import SortedRuns
from mobula.retrieval.docids.table import DocidTable

OUTSIDE = -1  # the node of a prefix that no live document has
CODE_BITS = 32  # an edge's key is its parent node and, in so many lower bits, its code


class Trie:
    """Distinct live codes as a trie, which never changes.

    Nodes are numbered in the order in which they came, level by level, node 0 being the root. ``edges`` lead from
    (node, code) to the child, ``leaves`` from the node at the end of a code to the table rows of its documents.
    Everything works on arrays of nodes of any shape, so a step over all beams of all requests is a few numpy calls.
    """

    def __init__(self, table: DocidTable, nodes: int, edges: SortedRuns, leaves: SortedRuns) -> None:
        self.levels, self.width, self.rows, self.nodes = table.levels, table.width, len(table), nodes
        self.edges, self.leaves = edges, leaves

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.edges.nbytes + self.leaves.nbytes

    @classmethod
    def build(cls, table: DocidTable) -> Trie:
        """The trie of the live rows of ``table``."""
        return cls(table, 1, SortedRuns(), SortedRuns())._with(table, np.flatnonzero(table.live))

    def extended(self, table: DocidTable) -> Trie:
        """The trie of ``table``, which has more rows behind those of this one's."""
        return self._with(table, np.arange(self.rows, len(table)))

    def root(self, *shape: int) -> np.ndarray:
        """The root for each of ``shape`` beams, i64."""
        return np.zeros(shape, np.int64)

    def mask(self, nodes: np.ndarray) -> np.ndarray:
        """Codes bool[..., K] that continue ``nodes`` i64[...]; none after a leaf or outside the trie."""
        flat = nodes.reshape(-1)
        owner, edge, _ = self.edges.between(flat << CODE_BITS, flat + 1 << CODE_BITS)
        out = np.zeros((len(flat), self.width), bool)
        out[owner, edge & (1 << CODE_BITS) - 1] = True
        return out.reshape(*nodes.shape, self.width)

    def step(self, nodes: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The child i64[...] of ``nodes`` i64[...] by ``codes`` i64[...]; OUTSIDE (-1) where there is none."""
        inside = (nodes != OUTSIDE) & (codes >= 0) & (codes < self.width)
        return np.where(inside, self.edges.first((nodes << CODE_BITS) + codes), OUTSIDE)

    def documents(self, leaf: int) -> np.ndarray:
        """Table rows of the documents at a leaf, in corpus order; none for any other node."""
        return self.leaves.between(np.array([leaf]), np.array([leaf + 1]))[2]

    def _with(self, table: DocidTable, rows: np.ndarray) -> Trie:
        """With the codes of further ``rows`` i64[m] of ``table``: what they share with the trie is found, not built."""
        node, nodes = np.zeros(len(rows), np.int64), self.nodes
        keys, children = [], []
        for level in range(table.levels):
            wanted = (node << CODE_BITS) + table.columns[level, rows]
            node = self.edges.first(wanted)
            fresh = node < 0
            new, which = np.unique(wanted[fresh], return_inverse=True)
            node[fresh] = nodes + which
            keys.append(new)
            children.append(nodes + np.arange(len(new)))
            nodes += len(new)
        edges = self.edges.extended(np.concatenate(keys), np.concatenate(children))
        return Trie(table, nodes, edges, self.leaves.extended(node, rows))
