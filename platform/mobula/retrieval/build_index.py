"""Build the index of a corpus of JSON lines, part by part.

A part is some lines of the file. What is made of it (passages and postings, then vectors) is done by the workers of a
pool, independently, and kept beside the index that is to be; so an interrupted build goes on with the parts that are
missing. Then the parts are merged in the order of ids, and the finished folder appears at once.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.artifacts import write_json
from mobula.cluster.pool import Pool, Row, Worker
from mobula.data.jsonl import read_passages, twice
from mobula.data.pseudo_queries import body
from mobula.data.stored_passages import IDS, PassagesWriter, StoredPassages, TextTable, encoded
from mobula.errors import DataError, RunConflict
from mobula.locks import alone
from mobula.models.encoders import MINILM, TextEncoder, load_encoder
from mobula.portable import Portable
from mobula.retrieval import stored_bm25, stored_dense
from mobula.retrieval.lexical import DEFAULT
from mobula.retrieval.stored_index import (
    LEXICAL,
    MANIFEST,
    PASSAGES,
    VECTORS,
    Manifest,
    has_part,
    identity,
    read_manifest,
    write_manifest,
)

log = logging.getLogger(__name__)
STEP = 1000  # lines to which the borders of parts are rounded
SMALLEST = 10_000  # lines of a part, where nobody says how many
USUAL, MOST = 150, 200  # parts; while they are merged, files of each are open
BLOCK = 8192  # vectors that are added to an index together
PLAN, LINES, FINISHED = "plan.json", "lines.npy", "finished"


@dataclass(frozen=True)
class BuildOptions:
    """What an index has: ``kind`` bm25, dense or hybrid; of vectors the ``encoder`` and the ``faiss`` index.

    ``shard``: lines of a part; None: as many as make some 150 parts.
    """

    kind: str = "bm25"
    encoder: str = MINILM
    faiss: str = "flat"
    shard: int | None = None


@dataclass(frozen=True)
class Part:
    """Lines of a corpus: bytes from ``start`` to ``end``, the first line being number ``first``."""

    number: int
    start: int
    end: int
    first: int

    def folder(self, work: Path) -> Path:
        """Where its passages and postings are kept."""
        return work / f"part-{self.number:05d}"

    def vectors(self, work: Path) -> Path:
        """Where its vectors are kept."""
        return work / f"vectors-{self.number:05d}.npy"


def build(
    corpus: Path, out: Path, options: BuildOptions, pool: Pool, check: Callable[[Path], None] | None = None
) -> Manifest:
    """Build the index of a corpus into the folder ``out``, or go on with building it; one that is there stays.

    ``check`` is called with the finished folder before it appears, and may raise.

    Raises:
        BadRecord: for a line that is no passage, or an id that is given twice.
        DataError: for an empty corpus.
        RunConflict: if ``out`` holds something else, or is being built from something else.
    """
    work = out.with_name(f".{out.name}.building")
    hash, ends = _survey(corpus)
    bm25, dense = _settings(options)
    expected = identity(hash, options.kind, bm25, dense)
    parts = _parts(ends, options.shard)
    if not out.exists():
        with alone(work):
            if not out.exists():  # another process may have built it meanwhile
                _plan(work, {"index": expected, "parts": [asdict(part) for part in parts]})
                order = _make_parts(corpus, work, parts, pool, bm25, dense)
                folder = work / FINISHED
                shutil.rmtree(folder, ignore_errors=True)
                sizes = _merge(work, parts, order, folder, bm25, dense)
                facts = {"name": str(corpus.resolve()), "sha256": hash, "passages": len(order.part)}
                write_manifest(folder, facts, options.kind, *sizes)
                if check:
                    check(folder)
                folder.rename(out)
    manifest = _finished(out, expected)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _settings(options: BuildOptions) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    k1, b = DEFAULT
    bm25 = {"k1": k1, "b": b} if has_part(options.kind, LEXICAL) else None
    if not has_part(options.kind, VECTORS):
        return bm25, None
    hash = load_encoder(options.encoder).hash
    return bm25, {"encoder": options.encoder, "encoder_hash": hash, "faiss": options.faiss}


def _survey(corpus: Path) -> tuple[str, list[tuple[int, int]]]:
    """The sha256 of a file, and (lines, bytes) up to every border between lines at which a part may end."""
    hashed, ends, lines, size = sha256(), [(0, 0)], 0, 0
    try:
        with corpus.open("rb") as stream:
            for lines, line in enumerate(stream, 1):
                hashed.update(line)
                size += len(line)
                if lines % STEP == 0:
                    ends.append((lines, size))
    except OSError as error:
        raise DataError(f"{corpus}: cannot read ({error.strerror})") from error
    if not lines:
        raise DataError(f"{corpus}: no passage in it")
    return hashed.hexdigest(), ends if ends[-1][0] == lines else [*ends, (lines, size)]


def _parts(ends: Sequence[tuple[int, int]], shard: int | None) -> list[Part]:
    lines = ends[-1][0]
    if shard is not None and lines > MOST * shard:
        raise DataError(
            f"--shard {shard} makes more than {MOST} parts of {lines} lines; give at least {-(-lines // MOST)}"
        )
    steps = -(-(shard or max(SMALLEST, lines // USUAL)) // STEP)
    borders = [*ends[:-1:steps], ends[-1]]
    pairs = enumerate(itertools.pairwise(borders))
    return [Part(number, start, end, line + 1) for number, ((line, start), (_, end)) in pairs]


def _finished(out: Path, expected: str) -> Manifest:
    """The index of a folder, if it is the expected one."""
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else None
    if manifest is None or manifest.hash != expected:
        what = "something that is no index" if manifest is None else "an index of another corpus or of another kind"
        raise RunConflict(f"{out}: holds {what}; give another --out, or remove it")
    return manifest


def _plan(work: Path, plan: Row) -> None:
    """Note what is built here, or check that it is the same as before."""
    file = work / PLAN
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != plan:
        raise RunConflict(
            f"{work}: left by a build that was interrupted, of another corpus or with other options; finish that one "
            "with its own command, or remove the folder"
        )
    write_json(file, plan)


def _make_parts(
    corpus: Path, work: Path, parts: Sequence[Part], pool: Pool, bm25: dict | None, dense: dict | None
) -> Order:
    """Make what is missing of all parts; the order of their passages, which is known before any of them is encoded."""
    _make(pool, ReadWorker(corpus, work, bm25 is not None), parts, lambda part: part.folder(work), "passages")
    order = _order(corpus, work, parts)
    if dense:
        encode = EncodeWorker(work, dense["encoder"], dense["encoder_hash"])
        _make(pool, encode, parts, lambda part: part.vectors(work), "vectors")
    return order


def _make(pool: Pool, worker: Worker, parts: Sequence[Part], result: Callable[[Part], Path], what: str) -> None:
    """Have workers make what is missing."""
    missing = [part for part in parts if not result(part).exists()]
    if len(missing) < len(parts):
        log.info("%s: %d of %d parts are there already", what, len(parts) - len(missing), len(parts))
    shards = [(part.number, [asdict(part)], 0) for part in missing]
    for done, _ in enumerate(pool.process(worker, shards), 1):
        log.info("%s: %d of %d parts", what, done, len(missing))


@dataclass
class ReadWorker:
    """Leaves the passages of a part, in the order of their ids, and if ``lexical`` their postings."""

    corpus: Path
    work: Path
    lexical: bool

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`, of one part."""
        for part in (Part(**item) for item in items):
            folder = part.folder(self.work)
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self._fill(partial, part)
            partial.rename(folder)
        return []

    def _fill(self, folder: Path, part: Part) -> None:
        numbered = read_passages(self.corpus, part.start, part.end, part.first)
        rows = [(encoded(passage, f"{self.corpus}, line {line}"), line) for line, passage in numbered]
        rows.sort(key=lambda row: (row[0][0], row[1]))
        with PassagesWriter(folder) as writer:
            for texts, _ in rows:
                writer.add(*texts)
        np.save(folder / LINES, np.array([line for _, line in rows], np.int64))
        if self.lexical:
            stored_bm25.count_terms(StoredPassages(folder), folder)


@dataclass
class EncodeWorker(Portable):
    """Leaves the vectors of a part's passages f32[n, D], encoded on an accelerator where there is one."""

    work: Path
    encoder: str
    hash: str

    @cached_property
    def opened(self) -> TextEncoder:
        """The encoder.

        Raises:
            DataError: if it is another one here than where the build was started.
        """
        encoder = load_encoder(self.encoder, "cuda" if torch.cuda.is_available() else "cpu")
        if encoder.hash != self.hash:
            raise DataError(f"encoder {self.encoder!r}: other files on a worker's machine than on the driver's")
        return encoder

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`, of one part."""
        for part in (Part(**item) for item in items):
            vectors = self.opened.embed([body(document) for document in StoredPassages(part.folder(self.work))])
            file = part.vectors(self.work)
            partial = file.with_name(f"partial-{file.name}")
            np.save(partial, vectors)
            partial.rename(file)
        return []


@dataclass(frozen=True)
class Order:
    """The passages of all parts in the order of their ids: the part of each i32[N], and its row there i32[N]."""

    part: np.ndarray
    row: np.ndarray

    def rows(self, parts: int) -> list[np.ndarray]:
        """The number, in this order, of every passage of each part."""
        by_part = np.argsort(self.part, kind="stable")
        return np.split(by_part, np.cumsum(np.bincount(self.part, minlength=parts))[:-1])


def _order(corpus: Path, work: Path, parts: Sequence[Part]) -> Order:
    """Merge the parts by id.

    Raises:
        BadRecord: for an id that is given twice.
        DataError: if there is no passage.
    """
    merged = heapq.merge(*(_numbered(part.folder(work), part.number) for part in parts))
    numbers, last = array("q"), (b"", 0)
    for id, line, part, row in merged:
        if id == last[0]:
            raise twice(corpus, line, id.decode(), last[1])
        last = (id, line)
        numbers.append(part << 32 | row)
    if not numbers:
        raise DataError(f"{corpus}: no passage in it")
    joined = np.asarray(numbers)
    return Order((joined >> 32).astype(np.int32), (joined & 0xFFFFFFFF).astype(np.int32))


def _numbered(folder: Path, part: int) -> Iterator[tuple[bytes, int, int, int]]:
    lines, ids = map(int, np.load(folder / LINES)), TextTable(folder, IDS).all_raw()
    return ((id, line, part, row) for row, (id, line) in enumerate(zip(ids, lines, strict=True)))


def _merge(
    work: Path, parts: Sequence[Part], order: Order, folder: Path, bm25: dict | None, dense: dict | None
) -> tuple[dict | None, dict | None]:
    """Make the files of the index; the settings of its parts with their sizes."""
    folders = [part.folder(work) for part in parts]
    log.info("merging %d passages of %d parts", len(order.part), len(parts))
    _merge_passages(folders, order, folder / PASSAGES)
    if bm25:
        (folder / LEXICAL).mkdir()
        rows = order.rows(len(parts))
        bm25 = {**bm25, "terms": stored_bm25.merge_terms(folders, rows, folder / LEXICAL, bm25["k1"], bm25["b"])}
    if dense:
        (folder / VECTORS).mkdir()
        vectors = Vectors([np.load(part.vectors(work), mmap_mode="r") for part in parts], order)
        total = len(order.part)
        sampled = np.linspace(0, total - 1, stored_dense.sample_size(total, dense["faiss"])).astype(np.int64)
        sizes = stored_dense.write_vectors(
            vectors.blocks(), vectors.of(sampled), total, dense["faiss"], folder / VECTORS
        )
        dense = {**dense, **sizes}
    return bm25, dense


def _merge_passages(folders: Sequence[Path], order: Order, folder: Path) -> None:
    folder.mkdir(parents=True)
    stored = [StoredPassages(one) for one in folders]
    with PassagesWriter(folder) as writer:
        for part, row in zip(order.part, order.row, strict=True):
            writer.add(*stored[part].raw(row))


@dataclass(frozen=True)
class Vectors:
    """The vectors of all parts in an order."""

    parts: list[np.ndarray]
    order: Order

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Those f32[n, D] of passages by their numbers i64[n]."""
        part, row = self.order.part[numbers], self.order.row[numbers]
        vectors = np.empty((len(numbers), self.parts[0].shape[1]), np.float32)
        for one in np.unique(part):
            chosen = part == one
            vectors[chosen] = self.parts[one][row[chosen]]
        return vectors

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them."""
        total = len(self.order.part)
        return (self.of(np.arange(at, min(at + BLOCK, total))) for at in range(0, total, BLOCK))
