"""Which codes still lead to a document, whatever the order in which levels are filled.

Shapes: batch B, levels L, codes K (the largest K_l), documents N, words W = ceil(N/64). A set of documents is a
row of W 64-bit words; bit n % 64 of word n // 64 stands for document n.
"""

from __future__ import annotations

import sys

import numpy as np

from mobula.errors import MobulaError
from mobula.retrieval.docids.table import DocidTable

WORD = 64
# Words scanned per code in the time it takes to list one document, per level asked for (measured).
WORDS_PER_DOCUMENT_ONE = 28
WORDS_PER_DOCUMENT_ALL = 6

if sys.byteorder != "little":
    raise MobulaError("mobula.retrieval.docids.bitset needs a little-endian machine")


class Bitset:
    """Documents by (level, code), for constrained decoding in any order.

    A decoder keeps ``valid`` u64[B, W], the live documents that agree with what it has committed so far:
    it starts from :meth:`all_valid` and narrows it by :meth:`commit`. As long as it commits codes that
    :meth:`allowed` admits, one level at a time, ``valid`` is never empty and the result is a corpus docid.
    """

    def __init__(self, table: DocidTable) -> None:
        self.levels, self.width, self.documents_total = table.levels, table.width, len(table)
        self.words = -(-len(table) // WORD)
        self.columns = table.columns
        row = np.arange(len(table))
        word, bit = row // WORD, np.uint64(1) << (row % WORD).astype(np.uint64)
        self.live = np.zeros(self.words, np.uint64)
        np.bitwise_or.at(self.live, word[table.live], bit[table.live])
        self.bits = np.zeros((self.levels, self.width, self.words), np.uint64)
        for level in range(self.levels):
            np.bitwise_or.at(self.bits[level], (self.columns[level], word), bit)
        self._slots = self.columns + np.arange(self.levels)[:, None] * self.width
        self._live_codes = ((self.bits & self.live) != 0).any(2)

    def all_valid(self, batch: int) -> np.ndarray:
        """All live documents for each of ``batch`` requests, u64[B, W]."""
        return np.repeat(self.live[None], batch, axis=0)

    def allowed(self, valid: np.ndarray, level: int | np.ndarray) -> np.ndarray:
        """Codes bool[B, K] of ``level`` (one for all, or i64[B]) that some document in ``valid`` u64[B, W] has."""
        levels = np.broadcast_to(np.asarray(level, np.int64), len(valid))
        few = self._few(valid, WORDS_PER_DOCUMENT_ONE)
        if few.all():
            return self._by_rows(valid, levels)
        out = np.empty((len(valid), self.width), bool)
        out[few] = self._by_rows(valid[few], levels[few])
        for b in np.flatnonzero(~few):
            out[b] = self._by_bits(valid[b], levels[b])
        return out

    def allowed_all(self, valid: np.ndarray) -> np.ndarray:
        """Codes bool[B, L, K] that some document in ``valid`` u64[B, W] has, at every level."""
        few = self._few(valid, WORDS_PER_DOCUMENT_ALL)
        if few.all():
            return self._all_by_rows(valid)
        out = np.empty((len(valid), self.levels, self.width), bool)
        out[few] = self._all_by_rows(valid[few])
        for b in np.flatnonzero(~few):
            out[b] = self._by_bits(valid[b], slice(None))
        return out

    def commit(self, valid: np.ndarray, level: int | np.ndarray, code: np.ndarray) -> np.ndarray:
        """The documents of ``valid`` u64[B, W] that have ``code`` i64[B] at ``level`` (one for all, or i64[B])."""
        return valid & self.bits[level, code]

    def of_codes(self, z: np.ndarray) -> np.ndarray:
        """The live documents u64[B, W] that agree with partial codes i64[B, L], -1 being open."""
        valid = self.all_valid(len(z))
        for level in range(self.levels):
            filled = np.flatnonzero(z[:, level] >= 0)
            valid[filled] &= self.bits[level, z[filled, level]]
        return valid

    def count(self, valid: np.ndarray) -> np.ndarray:
        """Documents i64[B] in each row of ``valid`` u64[B, W]."""
        return np.bitwise_count(valid).sum(-1, dtype=np.int64)

    def documents(self, valid: np.ndarray) -> list[np.ndarray]:
        """Rows of the table, ascending, in each row of ``valid`` u64[B, W]."""
        owner, row = self._members(valid)
        return np.split(row, np.searchsorted(owner, np.arange(1, len(valid))))

    def _few(self, valid: np.ndarray, words_per_document: int) -> np.ndarray:
        """Requests bool[B] with so few documents left that listing them beats scanning bit rows."""
        return self.count(valid) * words_per_document < self.width * self.words

    def _by_bits(self, valid: np.ndarray, level: int | slice) -> np.ndarray:
        """Codes bool[K] (all levels: bool[L, K]) for one request, by scanning bit rows."""
        if np.array_equal(valid, self.live):
            return self._live_codes[level]
        return (self.bits[level] & valid).any(-1)

    def _by_rows(self, valid: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Codes bool[B, K], by listing the documents."""
        owner, row = self._members(valid)
        out = np.zeros((len(valid), self.width), bool)
        out.reshape(-1)[owner * self.width + self.columns[levels[owner], row]] = True
        return out

    def _all_by_rows(self, valid: np.ndarray) -> np.ndarray:
        owner, row = self._members(valid)
        out = np.zeros((len(valid), self.levels, self.width), bool)
        out.reshape(-1)[self._slots[:, row] + owner * (self.levels * self.width)] = True
        return out

    def _members(self, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(request, document) of every set bit, by request, then document."""
        # Most words are empty after the first commit: look inside the others only.
        flat = valid.reshape(-1)
        word = np.flatnonzero(flat)
        bit = np.flatnonzero(np.unpackbits(flat[word].view(np.uint8), bitorder="little"))
        position = word[bit // WORD] * WORD + bit % WORD
        return np.divmod(position, self.words * WORD)
