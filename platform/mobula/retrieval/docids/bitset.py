"""Which codes still lead to a document, whatever the order in which levels are filled.

Shapes: batch B, levels L, codes K (the largest K_l), documents N, words W = ceil(N/64). A set of documents is a
row of W 64-bit words; bit n % 64 of word n // 64 stands for document n.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

from mobula.errors import MobulaError
from mobula.retrieval.docids.growing import ROOM, enlarged
from mobula.retrieval.docids.table import DocidTable

WORD = 64
# Words scanned per code in the time it takes to list one document, per level asked for (measured).
WORDS_PER_DOCUMENT_ONE = 28
WORDS_PER_DOCUMENT_ALL = 6

if sys.byteorder != "little":
    raise MobulaError("mobula.retrieval.docids.bitset needs a little-endian machine")


class BitRows:
    """Bits of documents by level and code, ``array`` u64[L, K, W] with room for more codes and documents.

    Versions share it: adding documents sets bits behind those of the others.
    """

    def __init__(self, levels: int, width: int) -> None:
        self.array = np.zeros((levels, width, 0), np.uint64)
        self._documents, self._lock = 0, threading.Lock()

    def append(self, start: int, columns: np.ndarray, width: int) -> bool:
        """Set the bits of documents ``start``.. with codes i64[L, m] below ``width``; False if others have these."""
        with self._lock:
            if start != self._documents:
                return False
            end = start + columns.shape[1]
            self._reserve(width, -(-end // WORD))
            row = np.arange(start, end)
            for level, codes in enumerate(columns):
                np.bitwise_or.at(self.array[level], (codes, row // WORD), _bit(row))
            self._documents = end
            return True

    def _reserve(self, width: int, words: int) -> None:
        levels, codes, room = self.array.shape
        if width <= codes and words <= room:
            return
        more_codes = codes if width <= codes else max(width, int(ROOM * codes)) if self._documents else width
        more_words = room if words <= room else max(words, int(ROOM * room))
        self.array = enlarged(self.array, (levels, more_codes, more_words))


def _bit(rows: np.ndarray) -> np.ndarray:
    """The bit u64[m] of each row in its word."""
    return np.uint64(1) << (rows % WORD).astype(np.uint64)


def _words(rows: np.ndarray, documents: int) -> np.ndarray:
    """A set of rows as words u64[W]."""
    words = np.zeros(-(-documents // WORD), np.uint64)
    np.bitwise_or.at(words, rows // WORD, _bit(rows))
    return words


class Bitset:
    """Documents by (level, code), for constrained decoding in any order.

    A decoder keeps ``valid`` u64[B, W], the live documents that agree with what it has committed so far:
    it starts from :meth:`all_valid` and narrows it by :meth:`commit`. As long as it commits codes that
    :meth:`allowed` admits, one level at a time, ``valid`` is never empty and the result is a corpus docid.
    """

    def __init__(self, table: DocidTable, bits: BitRows, live: np.ndarray, live_codes: np.ndarray) -> None:
        """``live`` u64[W] are the live documents, ``live_codes`` bool[L, K] the codes that they have."""
        self.levels, self.width, self.documents_total = table.levels, table.width, len(table)
        self.words = -(-len(table) // WORD)
        self.columns, self.live, self._live_codes, self._shared = table.columns, live, live_codes, bits
        # Rows of this version; bits behind its last document may be those of a later one, and never count: `valid`
        # has none of them.
        self.bits = bits.array[:, : self.width, : self.words]

    @classmethod
    def build(cls, table: DocidTable) -> Bitset:
        """Over all rows of ``table``."""
        bits = BitRows(table.levels, table.width)
        bits.append(0, table.columns, table.width)
        live_codes = np.zeros((table.levels, table.width), bool)
        rows = np.flatnonzero(table.live)
        live_codes[np.arange(table.levels)[:, None], table.columns[:, rows]] = True
        return cls(table, bits, _words(rows, len(table)), live_codes)

    def extended(self, table: DocidTable) -> Bitset:
        """Over ``table``, which has more rows behind those of this one's, all live."""
        start, shared = self.documents_total, self._shared
        new = table.columns[:, start:]
        if not shared.append(start, new, table.width):
            return Bitset.build(table)
        live = _words(np.arange(start, len(table)), len(table))
        live[: self.words] |= self.live
        live_codes = enlarged(self._live_codes, (self.levels, table.width))
        live_codes[np.arange(self.levels)[:, None], new] = True
        return Bitset(table, shared, live, live_codes)

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
        slots = self.columns[:, row] + np.arange(self.levels)[:, None] * self.width
        out.reshape(-1)[slots + owner * (self.levels * self.width)] = True
        return out

    def _members(self, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(request, document) of every set bit, by request, then document."""
        # Most words are empty after the first commit: look inside the others only.
        flat = valid.reshape(-1)
        word = np.flatnonzero(flat)
        bit = np.flatnonzero(np.unpackbits(flat[word].view(np.uint8), bitorder="little"))
        position = word[bit // WORD] * WORD + bit % WORD
        return np.divmod(position, self.words * WORD)
