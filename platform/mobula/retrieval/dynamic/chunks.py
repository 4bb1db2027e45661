"""Documents cut into chunks, each with a docid of its own (the multi-docid design, reconstruction).

A chunk is a document to everything that fits, trains and decodes docids; only the retriever of :mod:`.multi` knows
that several chunks are one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobula.config import key
from mobula.data.pseudo_queries import body
from mobula.data.records import Document, Query, RetrievalData
from mobula.errors import MobulaError
from mobula.models.encoders import TextEncoder
from mobula.models.text import StaticEmbedding
from mobula.retrieval.docids.quantised import nearest
from mobula.retrieval.docids.space import DocidSpace
from mobula.retrieval.search import Unsupported

SHORTEST = 16  # tokens of a last chunk that is kept
SEPARATOR = "\x1f"  # between a document's id and the number of its chunk; no id of a text collection holds it


@dataclass
class ChunksConfig:
    """How documents are cut and what a real query is trained to generate."""

    size: int = key(64, "tokens per chunk", ge=4, le=4096)
    per_document: int = key(8, "most chunks of a document (m); of more, this many evenly spaced ones", ge=1, le=256)
    query_target: str = key(
        "best_chunk",
        "what a training query is paired with: its document's chunk nearest to it, or all",
        choices=("best_chunk", "all"),
    )


def cut(ids: Sequence[int], size: int, most: int) -> list[tuple[int, int]]:
    """Begin and end of each chunk of a text of ``ids``: at least one, at most ``most``.

    Chunks follow each other without overlap; a last one of fewer than 16 tokens is left out.
    """
    ends = [(begin, min(begin + size, len(ids))) for begin in range(0, len(ids), size)]
    if len(ends) > 1 and ends[-1][1] - ends[-1][0] < SHORTEST:
        ends.pop()
    if len(ends) > most:
        ends = [ends[index] for index in np.linspace(0, len(ends) - 1, most).round().astype(int)]
    return ends or [(0, 0)]


def chunk_documents(documents: Sequence[Document], tokenizer: StaticEmbedding, config: ChunksConfig) -> list[Document]:
    """The chunks of documents as documents of their own, in order; :func:`owner` tells whose they are."""
    chunks = []
    for document, ids in zip(documents, tokenizer.encode([body(d) for d in documents]), strict=True):
        for number, (begin, end) in enumerate(cut(ids, config.size, config.per_document)):
            text = tokenizer.decode(ids[begin:end]) if len(ids) else body(document)
            chunks.append(Document(f"{document.id}{SEPARATOR}{number}", "", text, document.date))
    return chunks


def owner(id: str) -> str:
    """The document that a chunk belongs to."""
    return id.rpartition(SEPARATOR)[0]


def chunk_data(
    data: RetrievalData, tokenizer: StaticEmbedding, encoder: TextEncoder, config: ChunksConfig
) -> RetrievalData:
    """A corpus of chunks whose training queries ask for chunks; dev queries accept every chunk of their documents."""
    chunks = chunk_documents(data.documents, tokenizer, config)
    members: dict[str, list[int]] = {}
    for row, chunk in enumerate(chunks):
        members.setdefault(owner(chunk.id), []).append(row)
    queries = {
        split: [_asking_for(query, [chunks[row].id for gold in query.gold for row in members[gold]]) for query in part]
        for split, part in data.queries.items()
    }
    if config.query_target == "best_chunk" and queries.get("train"):
        vectors = encoder.embed([chunk.text for chunk in chunks])
        train = data.queries["train"]
        pairs = zip(train, encoder.embed([query.text for query in train]), strict=True)
        queries["train"] = [
            _asking_for(query, [chunks[_nearest(members[gold], vectors, vector)].id for gold in query.gold])
            for query, vector in pairs
        ]
    return replace(data, documents=chunks, queries=queries)


def _asking_for(query: Query, ids: Sequence[str]) -> Query:
    return replace(query, gold=tuple(ids), grades=None)


def _nearest(rows: list[int], vectors: np.ndarray, vector: np.ndarray) -> int:
    return rows[int((vectors[rows] @ vector).argmax())]


@dataclass(frozen=True)
class Expansion:
    """How a chunk that arrives later gets its code: ``free``, ``existing_leaf`` or ``existing_prefix:l``.

    ``free`` takes the nearest code there is. ``existing_prefix:l`` first takes, among the prefixes of l codes that
    chunks of the fit have, the one whose reconstruction is nearest, and encodes what is left freely;
    ``existing_leaf`` does so with whole codes, so that no code is new to the model.
    """

    rule: str
    prefix: int

    @classmethod
    def parse(cls, text: str, levels: int) -> Expansion:
        """Read a rule for codes of ``levels`` positions.

        Raises:
            MobulaError: for an unknown rule or a prefix that is no part of a code.
        """
        name, _, number = text.partition(":")
        if name in ("free", "existing_leaf") and not number:
            return cls(text, 0 if name == "free" else levels)
        if name == "existing_prefix" and number.isdigit() and 1 <= int(number) <= levels:
            return cls(text, int(number))
        raise MobulaError(f"expand={text!r}: expected free, existing_leaf or existing_prefix:l with 1 <= l <= {levels}")

    def encode(self, space: DocidSpace, known: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[N, L] of chunks with ``embeddings`` f32[N, D]; ``known`` i32[Z, L] are the codes of the fit.

        Of equally near codes the smallest is taken.
        """
        if not self.prefix:
            return space.encode_queries(embeddings)
        words = space.codewords()
        if words is None:
            raise Unsupported(f"expand={self.rule} needs a quantised docid family, found {space.family}")
        prefixes = np.unique(known[:, : self.prefix], axis=0)  # sorted, so argmin takes the smallest of equals
        parts = [words[level][prefixes[:, level]].astype(np.float64) for level in range(self.prefix)]
        chosen = prefixes[nearest(space.centred(embeddings), np.add.reduce(parts))]
        return space.encode_after(chosen, embeddings)
