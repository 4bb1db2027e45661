"""What versions of a growing docid table share, so that adding m documents to N costs about m.

Rows are appended to buffers that are larger than what is in them, of which every version sees its own beginning; sorted
look-ups are kept in runs of falling length (Bentley and Saxe, 1980). Both leave older versions as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np

FACTOR = 8  # a run is at least so many times longer than the next, so there are few and entries are merged rarely
ROOM = 1.5  # a full buffer becomes so many times larger


class Prefix(Sequence[str]):
    """The first ``length`` strings of a list that may grow."""

    def __init__(self, strings: list[str], length: int) -> None:
        self._strings, self._length = strings, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return islice(self._strings, self._length)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._strings[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._strings[index % self._length]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Rows:
    """The rows of the versions of a table that only grew: a version of N documents sees the first N.

    ``codes`` i32[R, L], ``columns`` i64[L, R] (the same by level) and ``live`` bool[R] (all True) have room for R rows;
    ``doc_ids`` has those that are filled. ``row_of`` leads from a document id to its row, ``with_code`` from the bytes
    of a code of the space (its first ``levels`` i32) to the rows that have it, in ascending order.
    """

    def __init__(self, codes: np.ndarray, doc_ids: Sequence[str], levels: int) -> None:
        self._lock = threading.Lock()
        self._levels = levels
        # There is no room yet, so the caller's array is never written to.
        self.codes = np.ascontiguousarray(codes, np.int32)
        self.columns = np.array(codes.T, np.int64, order="C")
        self.live = np.ones(len(codes), bool)
        self.doc_ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.with_code: dict[bytes, list[int]] = {}
        self._index(codes, doc_ids)

    def appended(self, length: int, codes: np.ndarray, doc_ids: Sequence[str]) -> Rows:
        """Rows whose first ``length`` are these and then ``codes`` i32[m, L] of ``doc_ids``.

        They are put behind the others in place; only where another version has grown from ``length`` rows before, the
        old ones are copied.
        """
        with self._lock:
            if length == len(self.doc_ids):
                self._reserve(length + len(codes))
                end = length + len(codes)
                self.codes[length:end], self.columns[:, length:end] = codes, codes.T
                self._index(codes, doc_ids)
                return self
        old = self.codes[:length]
        return Rows(np.concatenate([old, codes]), [*self.doc_ids[:length], *doc_ids], self._levels)

    def having(self, code: np.ndarray, length: int) -> list[int]:
        """The rows among the first ``length`` with this code, i32[L], or with these first ``levels`` of it."""
        rows = self.with_code.get(code[: self._levels].tobytes(), [])
        rest = code[self._levels :].tolist()
        return [r for r in rows if r < length and (not rest or self.codes[r, self._levels :].tolist() == rest)]

    def _index(self, codes: np.ndarray, doc_ids: Sequence[str]) -> None:
        keys = np.ascontiguousarray(codes[:, : self._levels], np.int32)
        for row, (key, doc_id) in enumerate(zip(keys, doc_ids, strict=True), len(self.doc_ids)):
            self.row_of[doc_id] = row
            self.with_code.setdefault(key.tobytes(), []).append(row)
        self.doc_ids.extend(doc_ids)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.codes):
            return
        room = max(rows, int(ROOM * len(self.codes)))
        self.codes = enlarged(self.codes, (room, *self.codes.shape[1:]))
        self.columns = enlarged(self.columns, (len(self.columns), room))
        self.live = np.ones(room, bool)


class Taken(Container[bytes]):
    """The codes of the space, as bytes, that the first ``length`` rows have."""

    def __init__(self, rows: Rows, length: int) -> None:
        self._rows, self._length = rows, length

    def __contains__(self, code: object) -> bool:
        first = self._rows.with_code.get(code, [self._length])[0]  # type: ignore[call-overload]
        return bool(first < self._length)


class RowOf(Mapping[str, int]):
    """The row of each live document of a version of N rows, in table order."""

    def __init__(self, rows: Rows, live: np.ndarray) -> None:
        self._rows, self._live = rows, live

    def __getitem__(self, doc_id: str) -> int:
        row = self._rows.row_of[doc_id]
        if row >= len(self._live) or not self._live[row]:
            raise KeyError(doc_id)
        return row

    def __len__(self) -> int:
        return int(np.count_nonzero(self._live))

    def __iter__(self) -> Iterator[str]:
        return (self._rows.doc_ids[row] for row in np.flatnonzero(self._live).tolist())


class SortedRuns:
    """A map from keys i64 to values i64, several a key, as sorted runs; it never changes.

    An entry is merged into a longer run as often as the number of runs grows with the logarithm of their entries.
    """

    def __init__(self, runs: tuple[tuple[np.ndarray, np.ndarray], ...] = ()) -> None:
        self.runs = runs

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for run in self.runs for array in run)

    def extended(self, keys: np.ndarray, values: np.ndarray) -> SortedRuns:
        """With further entries, i64[m] each; of one key they come behind those that there are."""
        if not len(keys):
            return self
        order = np.argsort(keys, kind="stable")
        runs = [*self.runs, (keys[order], values[order])]
        while len(runs) > 1 and len(runs[-2][0]) < FACTOR * len(runs[-1][0]):
            newer, older = runs.pop(), runs.pop()
            runs.append(_merged(older, newer))
        return SortedRuns(tuple(runs))

    def first(self, keys: np.ndarray) -> np.ndarray:
        """The first value of each of ``keys`` i64[...]; -1 where there is none."""
        found = np.full(keys.shape, -1, np.int64)
        for known, values in reversed(self.runs):
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            found = np.where(known[place] == keys, values[place], found)
        return found

    def between(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All entries with low[i] <= key < high[i] (i64[n]) as i, key and value i64[m], by run and then by i."""
        parts = [_between(keys, values, low, high) for keys, values in self.runs]
        if not parts:
            return (np.zeros(0, np.int64),) * 3
        owners, keys, values = zip(*parts, strict=True)
        return np.concatenate(owners), np.concatenate(keys), np.concatenate(values)


def enlarged(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A larger array with ``array`` in its first corner and zeros elsewhere."""
    larger = np.zeros(shape, array.dtype)
    larger[tuple(slice(size) for size in array.shape)] = array
    return larger


def _merged(older: tuple[np.ndarray, np.ndarray], newer: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
    keys, values = (np.concatenate(pair) for pair in zip(older, newer, strict=True))
    order = np.argsort(keys, kind="stable")  # a merge, since both halves are sorted
    return keys[order], values[order]


def _between(
    keys: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    begin = np.searchsorted(keys, low)
    length = np.searchsorted(keys, high) - begin
    owner = np.repeat(np.arange(len(low)), length)
    entry = np.arange(len(owner)) + np.repeat(begin - (np.cumsum(length) - length), length)
    return owner, keys[entry], values[entry]
