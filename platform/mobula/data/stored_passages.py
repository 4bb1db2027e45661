"""Texts on disk that are read one by one by memory map: the passages of a large corpus, the terms of an index."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mobula.data.records import Document
from mobula.errors import DataError

IDS, CONTENTS = "ids", "contents"  # of contents, titles and texts in turns


class TextTable(Sequence[str]):
    """N texts in two files: NAME.bin, their UTF-8 one after another, and NAME.npy, i64[N + 1], where each begins.

    Processes of a machine share the pages that they read, and none holds them all.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._starts = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        self._bytes: mmap.mmap | bytes = b""
        if self._starts[-1]:  # nothing can be mapped of an empty file
            with (folder / f"{name}.bin").open("rb") as stream:
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))[row]
        return [self[one] for one in rows] if isinstance(rows, range) else self.raw(rows).decode()

    def __iter__(self) -> Iterator[str]:
        return (text.decode() for text in self.all_raw())

    def raw(self, row: int) -> bytes:
        """The UTF-8 of a text."""
        return self._bytes[self._starts[row] : self._starts[row + 1]]

    def all_raw(self) -> Iterator[bytes]:
        """The UTF-8 of every text, in their order."""
        return map(self.raw, range(len(self)))

    def find(self, text: str) -> int | None:
        """The row of a text in a table that is sorted and names none twice; None if it is not there."""
        wanted, low, high = text.encode(errors="surrogatepass"), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.raw(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.raw(low) == wanted else None


class TableWriter:
    """Writes a :class:`TextTable`, text by text; it is whole when the block ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self._starts, self._index = array("q", [0]), folder / f"{name}.npy"
        self._stream = (folder / f"{name}.bin").open("wb")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, text: bytes) -> None:
        """Add the UTF-8 of a text."""
        self._stream.write(text)
        self._starts.append(self._starts[-1] + len(text))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is None:
            np.save(self._index, np.frombuffer(self._starts, np.int64))


class StoredPassages(Sequence[Document]):
    """The passages of a folder, in the order of their ids, read by number."""

    def __init__(self, folder: Path) -> None:
        self.ids, self._contents = TextTable(folder, IDS), TextTable(folder, CONTENTS)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))[row]
        if isinstance(rows, range):
            return [self[one] for one in rows]
        return Document(self.ids[rows], self._contents[2 * rows], self._contents[2 * rows + 1])

    def raw(self, row: int) -> tuple[bytes, bytes, bytes]:
        """The UTF-8 of a passage's id, title and text."""
        return self.ids.raw(row), self._contents.raw(2 * row), self._contents.raw(2 * row + 1)


class PassagesById(Mapping[str, Document]):
    """Stored passages by id."""

    def __init__(self, passages: StoredPassages) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __iter__(self) -> Iterator[str]:
        return iter(self._passages.ids)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._passages.ids.find(id) is not None

    def __getitem__(self, id: str) -> Document:
        row = self._passages.ids.find(id)
        if row is None:
            raise KeyError(id)
        return self._passages[row]


class PassagesWriter:
    """Writes :class:`StoredPassages`, passage by passage, in the order of the ids' UTF-8."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._contents = TableWriter(folder, IDS), TableWriter(folder, CONTENTS)

    def add(self, id: bytes, title: bytes, text: bytes) -> None:
        """Add the UTF-8 of a passage's id, title and text."""
        self._ids.add(id)
        self._contents.add(title)
        self._contents.add(text)

    def __enter__(self) -> PassagesWriter:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._ids.__exit__(*reason)
        self._contents.__exit__(*reason)


def encoded(document: Document, where: str) -> tuple[bytes, bytes, bytes]:
    """The UTF-8 of a passage's id, title and text.

    Raises:
        DataError: if there is none, for half of a surrogate pair.
    """
    try:
        return document.id.encode(), document.title.encode(), document.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {error.object[error.start]!r} is half of a surrogate pair; mend the text") from error
