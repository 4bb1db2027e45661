"""The live documents of a docid table, laid out for decoding."""

from __future__ import annotations

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

    Built once per table; a table never changes, so requests may share it and need no lock.
    """

    table: DocidTable
    doc_ids: list[str]
    columns: np.ndarray

    @classmethod
    def of(cls, table: DocidTable) -> Corpus:
        """The live documents of ``table``."""
        rows = np.flatnonzero(table.live)
        doc_ids = [table.doc_ids[row] for row in rows.tolist()]
        return cls(table, doc_ids, np.ascontiguousarray(table.codes[rows].T, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def levels(self) -> int:
        """Code length L."""
        return len(self.columns)

    @cached_property
    def bitset(self) -> Bitset:
        """Which documents are still possible after some codes."""
        return Bitset(self.table)

    @cached_property
    def trie(self) -> Trie:
        """The codes by prefix."""
        return Trie(self.table)

    @cached_property
    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct codes i64[C, L] and the index of each document's, i64[N]."""
        codes, code_of = np.unique(self.columns.T, axis=0, return_inverse=True)
        return codes, code_of

    @cached_property
    def position(self) -> np.ndarray:
        """Document of each row of the table, i64; -1 for a deleted one."""
        position = np.full(len(self.table), -1, np.int64)
        position[self.table.live] = np.arange(len(self))
        return position

    @cached_property
    def end(self) -> np.ndarray | None:
        """The end token's entries, bool[L, K]; None where codes have fixed length."""
        eos = self.table.space.eos
        if eos is None:
            return None
        is_end = np.zeros((self.levels, self.table.width), bool)
        is_end[: self.table.space.levels, eos] = True  # an appended level has an index, not a token
        return is_end

    @cached_property
    def id_rank(self) -> np.ndarray:
        """Place of each document in the order of document ids, i64[N]."""
        rank = np.empty(len(self), np.int64)
        rank[sorted(range(len(self)), key=self.doc_ids.__getitem__)] = np.arange(len(self))
        return rank

    @cached_property
    def _postings(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents by level and code, in table order: rows i64[L, N] and starts i64[L, K+1]."""
        rows = np.argsort(self.columns, axis=1, kind="stable")
        starts = [np.searchsorted(np.sort(column), np.arange(self.table.width + 1)) for column in self.columns]
        return rows, np.stack(starts)

    def having(self, level: int, code: int) -> np.ndarray:
        """The documents i64[m] with this code at this level."""
        rows, starts = self._postings
        return rows[level, starts[level, code] : starts[level, code + 1]]

    def bucket(self, code: np.ndarray) -> np.ndarray:
        """The documents i64[m] with exactly this code, in table order; empty if it is none's."""
        rows = self.having(0, int(code[0]))
        for level in range(1, self.levels):
            rows = rows[self.columns[level, rows] == code[level]]
        return rows

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
        best = rows[np.lexsort((self.id_rank[rows], -scores[rows]))[0]]
        return self.columns[:, best].copy()


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices i64[min(k, N)] of the k highest scores f[N], best first; of equal ones the lower index first."""
    return top_k(scores[None], k)[0][0]
