"""The docid table of a corpus: which document has which code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mobula.artifacts import write_json
from mobula.config import digest
from mobula.data.records import Document
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.retrieval.docids.config import COLLISIONS, TEXT
from mobula.retrieval.docids.space import DocidSpace, DocidTokenizer, entropies

ARRAYS = "docids.safetensors"
FACTS = "docids.json"


class DocidSpaceMismatch(ArtifactError):
    """A table whose codes mean something else to the model that asks for it."""


@dataclass(frozen=True)
class InsertReport:
    """What became of inserted documents.

    ``unreachable`` counts those the model cannot know to produce (random codes), ``empty`` those whose text
    docid has no token of the vocabulary, ``overflow`` those that share the last index of a full bucket.
    """

    documents: int
    unreachable: int = 0
    empty: int = 0
    overflow: int = 0


@dataclass(frozen=True, eq=False)
class DocidTable:
    """Codes of a corpus. Adding or removing documents gives a new table; readers of the old one keep theirs.

    ``codes`` i32[N, L]; ``live`` bool[N] is False for deleted documents, whose rows stay. ``sizes`` i32[L]
    are those of the space and, with collision ``append``, of one more level: the largest bucket at the build.
    """

    space: DocidSpace
    codes: np.ndarray
    doc_ids: list[str]
    live: np.ndarray
    sizes: np.ndarray
    collision: str = "bucket"
    rows_version: int = 0

    @classmethod
    def build(
        cls,
        space: DocidSpace,
        documents: Sequence[Document],
        embeddings: np.ndarray | None = None,
        collision: str = "bucket",
    ) -> DocidTable:
        """Encode a corpus.

        Raises:
            DataError: if two documents share an id.
            ConfigError: for an unknown collision policy.
        """
        if collision not in COLLISIONS:
            raise ConfigError([f"collision={collision!r}: expected one of {', '.join(COLLISIONS)}"], "docid")
        doc_ids = [d.id for d in documents]
        _require_unique(doc_ids)
        codes, sizes = space.encode(documents, embeddings), space.sizes
        if collision == "append":
            index = _bucket_index(codes, doc_ids)
            codes = np.column_stack([codes, index])
            sizes = np.append(sizes, index.max(initial=0) + 1).astype(np.int32)
        return cls(space, codes, doc_ids, np.ones(len(doc_ids), bool), sizes, collision)

    def __len__(self) -> int:
        """Rows, deleted ones included."""
        return len(self.doc_ids)

    @property
    def levels(self) -> int:
        """Code length L, an appended level included."""
        return len(self.sizes)

    @property
    def width(self) -> int:
        """The largest K_l."""
        return int(self.sizes.max())

    @property
    def hash(self) -> str:
        """The identity of the codes' meaning: the space's hash and, with ``append``, the appended level."""
        if self.collision == "bucket":
            return self.space.hash
        return digest([self.space.hash, self.collision, int(self.sizes[-1])])

    @cached_property
    def columns(self) -> np.ndarray:
        """Codes as i64[L, N], contiguous: the layout look-ups per level want."""
        return np.ascontiguousarray(self.codes.T, dtype=np.int64)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each live document."""
        return {self.doc_ids[row]: row for row in np.flatnonzero(self.live).tolist()}

    def insert(
        self, documents: Sequence[Document], embeddings: np.ndarray | None = None
    ) -> tuple[DocidTable, InsertReport]:
        """A table with more rows, and what became of them; no old row and nothing of the space changes.

        Raises:
            DataError: for an id that is in use or given twice.
            Unsupported: if the family cannot take documents without training (``atomic``).
        """
        doc_ids = [d.id for d in documents]
        _require_unique(doc_ids)
        known = next((i for i in doc_ids if i in self.rows), None)
        if known is not None:
            raise DataError(f"document {known!r} is already in the corpus; delete it first to replace it")
        levels = self.space.levels
        codes = self.space.encode(documents, embeddings, taken=self.codes[:, :levels])
        overflow = 0
        if self.collision == "append":
            index = _bucket_index(codes, doc_ids, self.codes[:, :levels])
            last = int(self.sizes[-1]) - 1
            overflow = int((index > last).sum())
            codes = np.column_stack([codes, np.minimum(index, last)]).astype(np.int32)
        report = InsertReport(
            documents=len(doc_ids),
            unreachable=len(doc_ids) if self.space.family == "random" else 0,
            empty=int((codes[:, :levels] == 0).all(1).sum()) if self.space.family in TEXT else 0,
            overflow=overflow,
        )
        table = replace(
            self,
            codes=np.concatenate([self.codes, codes]),
            doc_ids=self.doc_ids + doc_ids,
            live=np.concatenate([self.live, np.ones(len(doc_ids), bool)]),
            rows_version=self.rows_version + 1,
        )
        return table, report

    def delete(self, doc_ids: Sequence[str]) -> DocidTable:
        """A table in which these documents are no longer found; their rows stay, unused.

        Raises:
            DataError: for an id that is not in the corpus.
        """
        unknown = next((i for i in doc_ids if i not in self.rows), None)
        if unknown is not None:
            raise DataError(f"document {unknown!r} is not in the corpus")
        live = self.live.copy()
        live[[self.rows[i] for i in doc_ids]] = False
        return replace(self, live=live, rows_version=self.rows_version + 1)

    def report(self) -> dict[str, Any]:
        """How well live documents are told apart.

        ``collision_rate`` is the share of documents whose code is not theirs alone; ``entropy`` (bits),
        ``max_entropy`` and ``used_codes`` are lists by level.
        """
        codes = self.codes[self.live]
        counts = np.unique(codes, axis=0, return_counts=True)[1] if len(codes) else np.zeros(0, np.int64)
        return {
            "documents": len(codes),
            "distinct_codes": len(counts),
            "collision_rate": float(counts[counts > 1].sum() / max(1, len(codes))),
            "largest_bucket": int(counts.max(initial=0)),
            "entropy": entropies(codes, self.sizes).tolist(),
            "max_entropy": np.log2(self.sizes).tolist(),
            "used_codes": [len(np.unique(codes[:, level])) for level in range(self.levels)],
        }

    def save(self, directory: Path) -> None:
        """Write ``docids.safetensors`` and ``docids.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {f"space.{name}": np.ascontiguousarray(array) for name, array in self.space.arrays.items()}
        arrays |= {"codes": np.ascontiguousarray(self.codes), "live": self.live, "sizes": self.sizes}
        save_file(arrays, directory / ARRAYS)
        write_json(
            directory / FACTS,
            {
                "family": self.space.family,
                "hash": self.hash,
                "levels": self.space.levels,
                "meta": self.space.meta,
                "collision": self.collision,
                "rows_version": self.rows_version,
                "doc_ids": self.doc_ids,
            },
        )

    @classmethod
    def load(
        cls, directory: Path, expect_hash: str | None = None, tokenizer: DocidTokenizer | None = None
    ) -> DocidTable:
        """Read a table; text families need their ``tokenizer`` to encode further documents.

        Raises:
            DocidSpaceMismatch: if its hash is not ``expect_hash``, if the files' codebooks are not those the
                hash was taken of, or if the tokenizer is another one.
            ArtifactError: if the files are missing or damaged.
        """
        try:
            facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
            arrays = load_file(directory / ARRAYS)
            sizes, levels = arrays["sizes"], facts["levels"]
            books = {name.removeprefix("space."): a for name, a in arrays.items() if name.startswith("space.")}
            space = DocidSpace(facts["family"], sizes[:levels], books, facts["meta"], tokenizer)
            collision, version = facts["collision"], facts["rows_version"]
            table = cls(space, arrays["codes"], facts["doc_ids"], arrays["live"], sizes, collision, version)
            stored = facts["hash"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"{directory}: no readable docid table ({error.__class__.__name__}: {error})") from None
        if table.hash != stored:
            raise DocidSpaceMismatch(f"{directory}: codebooks differ from the hash in {FACTS}; write the table anew")
        if expect_hash is not None and table.hash != expect_hash:
            raise DocidSpaceMismatch(
                f"{directory}: docid space {table.hash[:12]}, expected {expect_hash[:12]}; "
                "use the table the model was trained with"
            )
        if tokenizer is not None and tokenizer.hash != space.meta.get("tokenizer_hash"):
            raise DocidSpaceMismatch(f"{directory}: docids were made with another tokenizer than {tokenizer.hash[:12]}")
        return table


def _bucket_index(codes: np.ndarray, doc_ids: Sequence[str], taken: np.ndarray | None = None) -> np.ndarray:
    """Position i32[N] of each row among the rows of equal code, by document id, after those in ``taken``."""
    occupied: dict[bytes, int] = {}
    for row in () if taken is None else np.ascontiguousarray(taken):
        occupied[row.tobytes()] = occupied.get(row.tobytes(), 0) + 1
    index = np.empty(len(codes), np.int32)
    for i in sorted(range(len(codes)), key=lambda i: doc_ids[i]):
        code = np.ascontiguousarray(codes[i]).tobytes()
        index[i] = occupied.get(code, 0)
        occupied[code] = index[i] + 1
    return index


def _require_unique(doc_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for doc_id in doc_ids:
        if doc_id in seen:
            raise DataError(f"document id {doc_id!r} occurs twice; ids must be unique")
        seen.add(doc_id)
