"""Vectors of a corpus in a faiss index on disk, opened by memory map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import faiss
import numpy as np

from mobula.models.encoders import TextEncoder
from mobula.retrieval.dense import nearest
from mobula.retrieval.search import SearchOptions, SearchResult

FAISS = ("flat", "ivf", "hnsw")
FILE = "vectors.faiss"
# HNSW: links of a vector, and how many candidates are kept while one is inserted or searched for.
LINKS, INSERTING, SEARCHING = 32, 80, 128
# IVF: lists per root of the number of vectors; the fewest of them that are read; training vectors of a list.
LISTS, PROBES, SAMPLED = 4, 16, 64


def write_vectors(vectors: Iterable[np.ndarray], sample: np.ndarray, total: int, kind: str, folder: Path) -> dict:
    """Make a faiss index of vectors, in blocks f32[n, D], ``total`` together; its sizes.

    ``sample`` f32[m, D]: what an inverted file learns its lists from. The index is in memory until it is written.
    """
    dim = sample.shape[1]
    index, sizes = _empty(dim, total, kind)
    if not index.is_trained:
        index.train(sample)
    for block in vectors:
        index.add(np.ascontiguousarray(block, dtype=np.float32))
    faiss.write_index(index, str(folder / FILE))
    return {"faiss": kind, "dim": dim, **sizes}


def sample_size(total: int, kind: str) -> int:
    """How many vectors :func:`write_vectors` wants as a sample."""
    return min(total, SAMPLED * _lists(total)) if kind == "ivf" else 1


def _empty(dim: int, total: int, kind: str) -> tuple[faiss.Index, dict[str, int]]:
    if kind == "flat":
        return faiss.IndexFlatIP(dim), {}
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = INSERTING, SEARCHING
        return graph, {"links": LINKS, "searching": SEARCHING}
    lists = _lists(total)
    inverted = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted.nprobe = min(lists, max(PROBES, lists // SAMPLED))  # type: ignore[attr-defined]
    return inverted, {"lists": lists, "probes": inverted.nprobe}  # type: ignore[attr-defined]


def _lists(total: int) -> int:
    # faiss wants 39 vectors a list to learn from.
    return max(1, min(round(LISTS * math.sqrt(total)), total // 39))


class StoredDense:
    """A stored index of an encoder's vectors; ``doc_ids`` are those of the corpus."""

    def __init__(self, folder: Path, encoder: TextEncoder, doc_ids: Sequence[str]) -> None:
        # faiss's OpenMP threads beside torch's own slow both down, and one query is one thread's work.
        faiss.omp_set_num_threads(1)
        self.name, self.encoder, self.doc_ids = f"dense:{encoder.name}", encoder, doc_ids
        # This flag maps every kind of index that is made here; IO_FLAG_MMAP would map inverted files alone.
        self._vectors = faiss.read_index(str(folder / FILE), faiss.IO_FLAG_MMAP_IFC)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`.Retriever`, but an inverted file or a graph may find fewer than k."""
        vectors = self.encoder.embed(list(queries))
        hits = [nearest(self._vectors, self.doc_ids, v, o.k) for v, o in zip(vectors, options, strict=True)]
        return [SearchResult(found, nfe=1, rows=1, scored_by="inner product") for found in hits]
