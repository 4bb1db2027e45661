"""The live documents of a docid table, laid out for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mobula.retrieval.docids.bitset import Bitset
from mobula.retrieval.docids.scoring import scores_from_columns, top_k
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.docids.trie import Trie


@dataclass(frozen=True, eq=False)
class Corpus:
    """Live documents 0..N-1 in table order. ``columns`` i64[L, N] holds their codes; a code below is i64[L].

    Built once per table; a table never changes, so requests may share it and need no lock. When documents are added
    to a table, what has been built of it is extended.
    """

    table: DocidTable
    doc_ids: Sequence[str]
    columns: np.ndarray

    @classmethod
    def of(cls, table: DocidTable) -> Corpus:
        """The live documents of ``table``; one corpus for all who ask for it."""
        return table.derived(cls)

    @classmethod
    def build(cls, table: DocidTable) -> Corpus:
        """The live documents of ``table``, without copies where none is deleted."""
        if table.whole:
            return cls(table, table.doc_ids, table.columns)
        rows = np.flatnonzero(table.live)
        return cls(table, [table.doc_ids[row] for row in rows.tolist()], table.columns[:, rows])

    def extended(self, table: DocidTable) -> Corpus:
        """The documents of ``table``, which has more behind these."""
        grown = Corpus.build(table)
        for name in ("bitset", "trie"):
            if name in vars(self):
                vars(grown)[name] = getattr(self, name).extended(table)
        return grown

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def levels(self) -> int:
        """Code length L."""
        return len(self.columns)

    @cached_property
    def bitset(self) -> Bitset:
        """Which documents are still possible after some codes."""
        return Bitset.build(self.table)

    @cached_property
    def trie(self) -> Trie:
        """The codes by prefix."""
        return Trie.build(self.table)

    @cached_property
    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct codes i64[C, L] and the index of each document's, i64[N]."""
        codes, code_of = np.unique(self.columns.T, axis=0, return_inverse=True)
        return codes, code_of

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The documents i64[m] of live ``rows`` i64[m] of the table."""
        return rows if self.table.whole else self._position[rows]

    @cached_property
    def _position(self) -> np.ndarray:
        return np.cumsum(self.table.live) - 1

    @cached_property
    def end(self) -> np.ndarray | None:
        """The end token's entries, bool[L, K]; None where codes have fixed length."""
        eos = self.table.space.eos
        if eos is None:
            return None
        is_end = np.zeros((self.levels, self.table.width), bool)
        is_end[: self.table.space.levels, eos] = True  # an appended level has an index, not a token
        return is_end

    def bucket(self, code: np.ndarray) -> np.ndarray:
        """The documents i64[m] with exactly this code, in table order; empty if it is none's."""
        return self.positions(self.table.with_code(code))

    def scores(self, log_probs: np.ndarray) -> np.ndarray:
        """s(c) = sum_l log p(c_l), f32[N], from a table f64[L, K]; documents of one code score exactly alike."""
        return scores_from_columns(log_probs[None], self.columns)[0]

    def distances(self, code: np.ndarray) -> np.ndarray:
        """Hamming distance of every document's code to ``code``, i64[N]."""
        return (self.columns != code[:, None]).sum(0)

    def nearest(self, code: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The corpus code at least Hamming distance from ``code``; ties by s(c), then by document id."""
        distances = self.distances(code)
        rows = np.flatnonzero(distances == distances.min())
        rows = rows[scores[rows] == scores[rows].max()]
        best = min(rows.tolist(), key=self.doc_ids.__getitem__)
        return self.columns[:, best].copy()


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices i64[min(k, N)] of the k highest scores f[N], best first; of equal ones the lower index first."""
    return top_k(scores[None], k)[0][0]
