"""BM25 on disk: built from parts of a corpus, opened by bm25s by memory map, ranking as :class:`.lexical.Bm25`.

The arrays are those that bm25s itself makes of the whole corpus; it would hold every word of it as an object. Terms are
in a :class:`.TextTable` instead of bm25s's dictionary, so that no process holds them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path

import bm25s
import numpy as np

from mobula.artifacts import write_json
from mobula.data.duplicates import ranges
from mobula.data.pseudo_queries import body
from mobula.data.records import Document
from mobula.data.stored_passages import TableWriter, TextTable
from mobula.errors import DataError
from mobula.retrieval.lexical import ranked, terms
from mobula.retrieval.search import SearchOptions, SearchResult

TERMS = "terms"
# As bm25s names them.
SCORES, ROWS, STARTS, PARAMETERS = (
    "data.csc.index.npy",
    "indices.csc.index.npy",
    "indptr.csc.index.npy",
    "params.index.json",
)


def count_terms(documents: Sequence[Document], folder: Path) -> None:
    """Leave the postings of a part of a corpus in a folder.

    Its terms, sorted; of each how many documents have it (``frequencies``), which ones (``rows``) and how often
    (``counts``), term after term; and how many terms each document has (``lengths``).
    """
    number: dict[str, int] = {}
    found, counts, sizes, lengths = array("i"), array("i"), array("q"), array("q")
    for document in documents:
        words = Counter(terms(body(document)))
        found.extend(number.setdefault(term, len(number)) for term in words)
        counts.extend(words.values())
        sizes.append(len(words))
        lengths.append(words.total())
    position = np.empty(len(number), np.int32)
    with TableWriter(folder, TERMS) as table:
        for term in sorted(number):
            position[number[term]] = len(table)
            table.add(term.encode())
    of = position[np.asarray(found)]
    order = np.argsort(of, kind="stable")
    np.save(folder / "frequencies.npy", np.bincount(of, minlength=len(number)))
    np.save(folder / "rows.npy", np.repeat(np.arange(len(sizes), dtype=np.int32), np.asarray(sizes))[order])
    np.save(folder / "counts.npy", np.asarray(counts)[order])
    np.save(folder / "lengths.npy", np.asarray(lengths))


def merge_terms(parts: Sequence[Path], rows: Sequence[np.ndarray], folder: Path, k1: float, b: float) -> int:
    """Make the index of a corpus of the postings of its parts; the number of its terms.

    ``rows[p]`` i64[n]: the numbers, in the whole corpus, of the documents of part p.

    Raises:
        DataError: if no document has a word.
    """
    numbers, frequencies = _merge_vocabularies(parts, folder)
    if not len(frequencies):
        raise DataError("BM25 needs a document with at least one word that is not a stop word")
    lengths = [np.load(part / "lengths.npy") for part in parts]
    total = sum(map(len, lengths))
    mean = np.concatenate(lengths).mean()
    starts = np.append(0, np.cumsum(frequencies))
    scores, documents = (
        np.lib.format.open_memmap(folder / name, "w+", kind, (int(starts[-1]),))
        for name, kind in ((SCORES, np.float32), (ROWS, np.int32))
    )
    idf, begin = _idf(frequencies, total), starts[:-1].copy()
    for part, number, row, length in zip(parts, numbers, rows, lengths, strict=True):
        own = np.load(part / "frequencies.npy")
        local, counts = np.load(part / "rows.npy"), np.load(part / "counts.npy").astype(np.float32)
        norm = k1 * ((1 - b) + b * length / mean)
        _, at = ranges(begin[number], own)
        # In double precision, rounded once at the end, as in bm25s: so scores have the same bits.
        scores[at] = np.repeat(idf[number], own) * (counts / (norm[local] + counts))
        documents[at] = row[local]
        begin[number] += own
    scores.flush()
    documents.flush()
    np.save(folder / STARTS, starts)
    parameters = {"k1": k1, "b": b, "method": "lucene", "dtype": "float32", "int_dtype": "int32", "num_docs": total}
    write_json(folder / PARAMETERS, {**parameters, "version": bm25s.__version__})
    return len(frequencies)


def _idf(frequencies: np.ndarray, total: int) -> np.ndarray:
    """Lucene's inverse document frequency f32[V]."""
    different, inverse = np.unique(frequencies, return_inverse=True)
    values = [math.log(1 + (total - count + 0.5) / (count + 0.5)) for count in different.tolist()]
    return np.array(values, np.float32)[inverse]


def _merge_vocabularies(parts: Sequence[Path], folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Write the terms of all parts; the number of each part's terms among them, and in how many documents each is."""
    tables = [TextTable(part, TERMS) for part in parts]
    numbers = [np.empty(len(table), np.int64) for table in tables]
    merged = heapq.merge(*(_numbered(table, part) for part, table in enumerate(tables)))
    with TableWriter(folder, TERMS) as writer:
        for term, places in itertools.groupby(merged, key=itemgetter(0)):
            for _, part, row in places:
                numbers[part][row] = len(writer)
            writer.add(term)
        frequencies = np.zeros(len(writer), np.int64)
    for own, counted in zip(numbers, parts, strict=True):
        frequencies[own] += np.load(counted / "frequencies.npy")
    return numbers, frequencies


def _numbered(table: TextTable, part: int) -> Iterator[tuple[bytes, int, int]]:
    return ((term, part, row) for row, term in enumerate(table.all_raw()))


class StoredBm25:
    """A stored BM25; ``doc_ids`` are those of the corpus."""

    name = "bm25"

    def __init__(self, folder: Path, doc_ids: Sequence[str]) -> None:
        self.doc_ids, self._folder = doc_ids, folder
        self._terms = TextTable(folder, TERMS)

    @cached_property
    def _scorer(self) -> bm25s.BM25:
        return bm25s.BM25.load(self._folder, mmap=True, load_vocab=False, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """As :class:`.lexical.Scored`."""
        known = [row for row in map(self._terms.find, terms(query)) if row is not None]
        return self._scorer.get_scores_from_ids(known) if known else np.zeros(len(self.doc_ids), dtype=np.float32)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`.Retriever`."""
        return ranked(self, queries, options)
