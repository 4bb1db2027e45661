"""The docid table of a corpus: which document has which code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mobula.artifacts import write_json
from mobula.config import digest
from mobula.data.records import Document
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.retrieval.docids.config import COLLISIONS
from mobula.retrieval.docids.growing import Prefix, RowOf, Rows, Taken
from mobula.retrieval.docids.hierarchy import FreeIndices
from mobula.retrieval.docids.quantised import entropies
from mobula.retrieval.docids.space import DocidSpace
from mobula.retrieval.docids.text import DocidTokenizer

ARRAYS = "docids.safetensors"
FACTS = "docids.json"


class DocidSpaceMismatch(ArtifactError):
    """A table whose codes mean something else to the model that asks for it."""


class Derived(Protocol):
    """What is built of a table's rows and can follow when rows are added."""

    @classmethod
    def build(cls, table: DocidTable) -> Self:
        """Over all rows of ``table``."""

    def extended(self, table: DocidTable) -> Self:
        """Over ``table``, whose first rows are those of the table that this is of, all live; this one stays valid."""


D = TypeVar("D", bound=Derived)


@dataclass(frozen=True)
class InsertReport:
    """What became of inserted documents.

    ``unreachable`` counts those the model cannot know to produce (random codes), ``empty`` those whose text
    has no token, ``overflow`` those that share the last index of a full bucket or leaf,
    ``collisions`` those whose code another document has too.
    """

    documents: int
    unreachable: int = 0
    empty: int = 0
    overflow: int = 0
    collisions: int = 0


@dataclass(frozen=True, eq=False)
class DocidTable:
    """Codes of a corpus. Adding or removing documents gives a new table; readers of the old one keep theirs.

    ``codes`` i32[N, L]; ``live`` bool[N] is False for deleted documents, whose rows stay until more are inserted.
    ``sizes`` i32[L] are those of the space and, with collision ``append``, of one more level: the largest bucket
    at the build. ``tokens`` i64[m], of text families: what documents that the fit has not seen brought into the
    vocabulary; every level of the space is larger by as many codes.
    """

    space: DocidSpace
    codes: np.ndarray
    doc_ids: Sequence[str]
    live: np.ndarray
    sizes: np.ndarray
    collision: str = "bucket"
    rows_version: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

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
        nothing = np.zeros(0, np.int64)
        codes, tokens = space.kind.insert(space, documents, embeddings, frozenset(), nothing)
        sizes = space.sizes + np.int32(len(tokens))
        if collision == "append":
            index = _free_index(codes, doc_ids, lambda _: frozenset())
            codes = np.column_stack([codes, index])
            sizes = np.append(sizes, index.max(initial=0) + 1).astype(np.int32)
        return cls(space, codes, doc_ids, np.ones(len(doc_ids), bool), sizes, collision, tokens=tokens)

    def __len__(self) -> int:
        """Rows, deleted ones included."""
        return len(self.doc_ids)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is shared or built is not for another process."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

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

    @property
    def vocabulary(self) -> np.ndarray:
        """The token i64[K] of every code of a text family."""
        return np.append(self.space.arrays["vocabulary"], self.tokens)

    @cached_property
    def columns(self) -> np.ndarray:
        """Codes as i64[L, N], contiguous by level: the layout look-ups per level want."""
        return self._rows.columns[:, : len(self)]

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Row of each live document."""
        return RowOf(self._rows, self.live)

    @cached_property
    def whole(self) -> bool:
        """Whether no row is that of a deleted document."""
        return bool(self.live.all())

    def with_code(self, code: np.ndarray) -> np.ndarray:
        """The live rows i64[m] that have exactly this code, i[L], in ascending order."""
        rows = np.array(self._rows.having(code.astype(np.int32), len(self)), np.int64)
        return rows[self.live[rows]]

    def derived(self, kind: type[D]) -> D:
        """What ``kind.build`` makes of this table, made once; insertion hands it on by its ``extended``."""
        if kind not in self._derived:
            self._derived[kind] = kind.build(self)
        return self._derived[kind]  # type: ignore[return-value]

    @cached_property
    def _rows(self) -> Rows:
        """The rows, shared with the tables that grow from this one."""
        return Rows(self.codes, self.doc_ids, self.space.levels)

    @cached_property
    def _derived(self) -> dict[type[Derived], Derived]:
        return {}

    def insert(
        self, documents: Sequence[Document], embeddings: np.ndarray | None = None
    ) -> tuple[DocidTable, InsertReport]:
        """A table with more rows, and what became of them; no other code and nothing of the space changes.

        The codes of text families may be tokens that the table did not have: levels are larger by them.

        Old rows are shared, not copied, unless documents have been deleted since the last insertion: their rows go,
        and their codes can be given again.

        Raises:
            DataError: for an id that is in use or given twice.
            Unsupported: if the family cannot take documents without training (``atomic``).
        """
        doc_ids = [d.id for d in documents]
        _require_unique(doc_ids)
        known = next((i for i in doc_ids if i in self.rows), None)
        if known is not None:
            raise DataError(f"document {known!r} is already in the corpus; delete it first to replace it")
        old, levels, kind = self._without_deleted(), self.space.levels, self.space.kind
        taken = Taken(old._rows, len(old))
        codes, tokens = kind.insert(self.space, documents, embeddings, taken, self.tokens)
        sizes = self.sizes.copy()
        sizes[:levels] += len(tokens) - len(self.tokens)
        if self.collision == "append":
            index = _free_index(codes, doc_ids, old._appended)
            codes = np.column_stack([codes, np.minimum(index, self.sizes[-1] - 1)]).astype(np.int32)
        collisions, repeated = old._shared(codes)
        report = InsertReport(
            documents=len(doc_ids),
            unreachable=0 if kind.reachable else len(doc_ids),
            empty=kind.empty(codes[:, :levels]),
            # Either hands out indices that differ as long as there are any.
            overflow=repeated if self.collision == "append" or kind.allots else 0,
            collisions=collisions,
        )
        return old._grown(codes, doc_ids, sizes, tokens), report

    def delete(self, doc_ids: Sequence[str]) -> DocidTable:
        """A table in which these documents are no longer found; their rows stay, unused.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        _require_unique(doc_ids)
        unknown = next((i for i in doc_ids if i not in self.rows), None)
        if unknown is not None:
            raise DataError(f"document {unknown!r} is not in the corpus")
        live = self.live.copy()
        live[[self.rows[i] for i in doc_ids]] = False
        less = replace(self, live=live, rows_version=self.rows_version + 1)
        vars(less)["_rows"] = self._rows
        return less

    def _without_deleted(self) -> DocidTable:
        """The live rows alone."""
        if self.whole:
            return self
        stay = np.flatnonzero(self.live)
        doc_ids = [self.doc_ids[row] for row in stay.tolist()]
        return replace(self, codes=self.codes[stay], doc_ids=doc_ids, live=np.ones(len(stay), bool))

    def _grown(self, codes: np.ndarray, doc_ids: Sequence[str], sizes: np.ndarray, tokens: np.ndarray) -> DocidTable:
        """The next version, with more rows behind the present ones, and whatever this one has built, extended."""
        length = len(self) + len(doc_ids)
        rows = self._rows.appended(len(self), codes, doc_ids)
        table = replace(
            self,
            codes=rows.codes[:length],
            doc_ids=Prefix(rows.doc_ids, length),
            live=rows.live[:length],
            sizes=sizes,
            rows_version=self.rows_version + 1,
            tokens=tokens,
        )
        # Cached properties that would otherwise be built from nothing.
        vars(table).update(_rows=rows, whole=True)
        vars(table)["_derived"] = {kind: one.extended(table) for kind, one in list(self._derived.items())}
        return table

    def _appended(self, code: tuple[int, ...]) -> frozenset[int]:
        """The appended indices in use behind the code i32[L] of the space."""
        rows = self._rows.having(np.array(code, np.int32), len(self))
        return frozenset(self.codes[rows, -1].tolist())

    def _shared(self, codes: np.ndarray) -> tuple[int, int]:
        """How many new rows have a code that another row, old or new, has too, and how many one that came before."""
        counts = Counter(code.tobytes() for code in codes)
        old = {code for code in counts if self._rows.having(np.frombuffer(code, np.int32), len(self))}
        shared = sum(n for code, n in counts.items() if n > 1 or code in old)
        return shared, len(codes) - len(counts.keys() - old)

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
        arrays |= {"tokens": self.tokens}
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
                "doc_ids": list(self.doc_ids),
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
            sizes, levels, tokens = arrays["sizes"], facts["levels"], arrays["tokens"]
            books = {name.removeprefix("space."): a for name, a in arrays.items() if name.startswith("space.")}
            fitted = (sizes[:levels] - len(tokens)).astype(sizes.dtype)
            space = DocidSpace(facts["family"], fitted, books, facts["meta"], tokenizer)
            collision, version = facts["collision"], facts["rows_version"]
            table = cls(space, arrays["codes"], facts["doc_ids"], arrays["live"], sizes, collision, version, tokens)
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


def _free_index(codes: np.ndarray, doc_ids: Sequence[str], used: Callable[[tuple[int, ...]], Set[int]]) -> np.ndarray:
    """An index i32[N] that tells each row from the others of equal code, by document id, and from those ``used``."""
    free = FreeIndices(used)
    index = np.empty(len(codes), np.int32)
    for i in sorted(range(len(codes)), key=lambda i: doc_ids[i]):
        index[i] = free.take(tuple(codes[i].tolist()))
    return index


def _require_unique(doc_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for doc_id in doc_ids:
        if doc_id in seen:
            raise DataError(f"document id {doc_id!r} occurs twice; ids must be unique")
        seen.add(doc_id)
