"""Pseudo-queries: texts made of a document that stand for queries nobody has asked yet.

Those of a document depend on the seed and the document (key phrases also on the corpus's document
frequencies), never on how many documents are beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mobula.data.duplicates import jaccard, normalise
from mobula.data.records import Document, Query
from mobula.data.sources import read_jsonl, text_field
from mobula.errors import BadRecord, DataError

KINDS = ("window", "keyphrase", "chunk", "title", "file")


def generator(seed: int, kind: str, document: str) -> np.random.Generator:
    """The random generator of one document's pseudo-queries of one kind."""
    digest = hashlib.sha256(f"{seed}\0{kind}\0{document}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def windows(text: str, count: int, random: np.random.Generator, low: int = 8, high: int = 24) -> list[str]:
    """``count`` runs of ``low`` to ``high`` contiguous words; of a shorter text, all of it. Empty text: none."""
    words = text.split()
    if not words:
        return []
    lengths = np.minimum(random.integers(low, high + 1, size=count), len(words))
    starts = random.integers(0, len(words) - lengths + 1)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def chunks(text: str, size: int) -> list[str]:
    """The text cut into runs of ``size`` words, the last one shorter."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, len(words), size)]


class KeyPhrases:
    """Sets of terms drawn in proportion to tf * idf, idf = ln((1 + N) / (1 + df)), from the documents given."""

    def __init__(self, documents: Sequence[Document]) -> None:
        frequency = Counter(term for d in documents for term in set(normalise(body(d)).split()))
        count = len(documents)
        self.idf = {term: math.log((1 + count) / (1 + df)) for term, df in frequency.items()}

    def sample(self, text: str, count: int, random: np.random.Generator, low: int = 3, high: int = 8) -> list[str]:
        """``count`` pseudo-queries of ``low`` to ``high`` distinct terms (fewer if the text has fewer)."""
        frequency = Counter(normalise(text).split())
        terms = sorted(term for term in frequency if self.idf.get(term, 0.0) > 0)
        if not terms:
            return []
        weights = np.array([frequency[term] * self.idf[term] for term in terms])
        sizes = np.minimum(random.integers(low, high + 1, size=count), len(terms))
        # Gumbel-top-k: the k largest of log w + Gumbel noise are k draws without replacement.
        keys = np.log(weights) + random.gumbel(size=(count, len(terms)))
        order = np.argsort(-keys, axis=1)
        return [" ".join(terms[i] for i in row[:size]) for row, size in zip(order, sizes, strict=True)]


def read_pseudo_queries(path: Path, documents: Iterable[Document]) -> dict[str, list[str]]:
    """Pseudo-queries of an external generator: JSONL with ``doc_id`` and ``text``, by document id.

    Raises:
        BadRecord: naming line and field; also for a document that is not in the corpus.
    """
    known = {document.id for document in documents}
    queries: dict[str, list[str]] = defaultdict(list)
    for number, value in read_jsonl(path):
        where = f"{path}, line {number}"
        id = text_field(value, ("doc_id",), where)
        if id not in known:
            raise BadRecord(f"{where}: field doc_id={id!r} is not a document of the corpus")
        queries[id].append(text_field(value, ("text",), where))
    return dict(queries)


def make_pseudo_queries(
    documents: Sequence[Document],
    kind: str,
    count: int,
    seed: int,
    *,
    path: Path | None = None,
    held_out: Sequence[Query] = (),
    near_duplicate: float = 0.8,
    chunk_words: int = 24,
) -> list[Query]:
    """Up to ``count`` pseudo-queries per document, whose gold is that document, document by document.

    ``window`` and ``keyphrase`` draw with repetition; ``chunk`` cuts the text; ``title`` is the title of a document
    that has one; ``file`` reads ``path``. One that is a near-duplicate of a ``held_out`` query of the same document is
    left out.

    Raises:
        DataError: if none is left at all.
    """
    external = read_pseudo_queries(path, documents) if kind == "file" and path is not None else {}
    phrases = KeyPhrases(documents) if kind == "keyphrase" else None
    forbidden: dict[str, list[frozenset[str]]] = defaultdict(list)
    for query in held_out:
        for id in query.gold:
            forbidden[id].append(frozenset(normalise(query.text).split()))
    queries: list[Query] = []
    for document in documents:
        random = generator(seed, kind, document.id)
        if kind == "window":
            texts = windows(body(document), count, random)
        elif phrases is not None:
            texts = phrases.sample(body(document), count, random)
        elif kind == "chunk":
            texts = chunks(body(document), chunk_words)[:count]
        elif kind == "title":
            texts = [document.title][:count] if document.title else []
        else:
            texts = external.get(document.id, [])[:count]
        texts = [text for text in texts if not _near(text, forbidden[document.id], near_duplicate)]
        queries.extend(Query(f"{document.id}#{kind}{i}", text, (document.id,)) for i, text in enumerate(texts))
    if not queries and count:
        raise DataError(f"no {kind} pseudo-query could be made of {len(documents)} documents; are their texts empty?")
    return queries


def hold_out_windows(documents: Sequence[Document], count: int, seed: int, *, min_words: int = 32) -> list[Query]:
    """One window of each of ``count`` documents drawn from those of at least ``min_words`` words."""
    long = [d for d in documents if len(body(d).split()) >= min_words]
    if not long:
        raise DataError(f"no document has {min_words} words, so no window can be held out; lower data.dev_windows")
    rows = np.random.default_rng(seed).permutation(len(long))[:count]
    held = [(d, windows(body(d), 1, generator(seed, "held_out", d.id))) for d in (long[i] for i in sorted(rows))]
    return [Query(f"{d.id}#held_out", texts[0], (d.id,)) for d, texts in held]


def body(document: Document) -> str:
    """Title and text, as retrievers read a document."""
    return f"{document.title}\n{document.text}".strip()


def _near(text: str, forbidden: list[frozenset[str]], threshold: float) -> bool:
    words = frozenset(normalise(text).split())
    return any(jaccard(words, other) >= threshold for other in forbidden)
