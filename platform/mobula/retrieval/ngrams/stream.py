"""Documents as streams of codes: what n-grams are taken from, and the vocabulary that gives tokens their codes.

The stream of a document is TITLE, the leading tokens of its title, TITLE_END, the title's further tokens and another
TITLE_END if there are any, its body, BREAK. A title key is TITLE, tokens, TITLE_END and nothing else; other n-grams
hold no mark, so none crosses from one document, or one part of it, into the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mobula.data.pseudo_queries import KeyPhrases, body, generator
from mobula.data.records import Document
from mobula.models.text import StaticEmbedding

# BREAK ends a document or a part of it, and stands where a limited vocabulary lacks a token.
BREAK, TITLE, TITLE_END, FIRST = 0, 1, 2, 3  # code FIRST is the first token
# Names the random numbers of pseudo-queries, so that they are not the key phrases that training queries are made of.
GENERATED = "generated"


@dataclass(frozen=True, eq=False)
class Streams:
    """The streams of N documents behind each other: codes i32[n], their lengths i64[N]."""

    codes: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Streams:
        """From one array a document."""
        codes = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
        return cls(codes, np.array([len(row) for row in rows], np.int64))

    @classmethod
    def concat(cls, parts: Iterable[Streams]) -> Streams:
        """The documents of all ``parts``, in order."""
        parts = list(parts)
        return cls(np.concatenate([p.codes for p in parts]), np.concatenate([p.lengths for p in parts]))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, and the end: i64[N + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def row(self, document: int) -> np.ndarray:
        """The codes of one document."""
        return self.codes[self.starts[document] : self.starts[document + 1]]

    def select(self, documents: Sequence[int]) -> Streams:
        """Some of the documents, in the order given."""
        return Streams.of([self.row(document) for document in documents])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which token each code is: ``tokens`` i64[V - 3] of the codes from FIRST on, in the order they were given.

    The first ``initial`` codes are those of the fit. A ``limited`` vocabulary takes no further token.
    """

    tokens: np.ndarray
    initial: int
    limited: bool
    token_count: int  # of the tokenizer

    @classmethod
    def fit(cls, streams: Iterable[np.ndarray], token_count: int, most_frequent: int | None = None) -> Vocabulary:
        """The tokens of raw ``streams`` (:func:`raw_streams`), or the most frequent of them, ordered by id."""
        counts = np.zeros(token_count + FIRST, np.int64)
        for stream in streams:
            counts += np.bincount(stream, minlength=len(counts))
        counts = counts[FIRST:]
        tokens = np.flatnonzero(counts)
        if most_frequent is not None:
            tokens = np.sort(tokens[np.argsort(-counts[tokens], kind="stable")[:most_frequent]])
        return cls(tokens, FIRST + len(tokens), most_frequent is not None, token_count)

    @property
    def size(self) -> int:
        """Number of codes V, marks included."""
        return FIRST + len(self.tokens)

    @property
    def absent(self) -> np.ndarray:
        """Tokens of the tokenizer that have no code, i64."""
        return np.setdiff1d(np.arange(self.token_count), self.tokens)

    @cached_property
    def _code(self) -> np.ndarray:
        """Code of each raw entry; tokens without one are a BREAK."""
        code = np.full(self.token_count + FIRST, BREAK, np.int32)
        code[:FIRST] = np.arange(FIRST)
        code[self.tokens + FIRST] = np.arange(FIRST, self.size)
        return code

    def extended(self, streams: Iterable[np.ndarray]) -> Vocabulary:
        """With the tokens of raw ``streams`` that have no code yet behind the others; old codes stay."""
        if self.limited:
            return self
        tokens = np.unique(np.concatenate([np.zeros(0, np.int64), *streams]))
        fresh = tokens[(tokens >= FIRST) & (self._code[tokens] == BREAK)] - FIRST
        return replace(self, tokens=np.concatenate([self.tokens, fresh])) if len(fresh) else self

    def encode(self, streams: Sequence[np.ndarray]) -> Streams:
        """Raw streams as codes."""
        return Streams.of([self._code[stream] for stream in streams])

    def codes(self, tokens: Sequence[int]) -> np.ndarray:
        """Codes i32[m] of those of ``tokens`` that have one."""
        codes = self._code[np.asarray(tokens, np.int64) + FIRST]
        return codes[codes != BREAK]


@dataclass(frozen=True)
class QueryGenerator:
    """Pseudo-queries of any document: key phrases weighted by the ``idf`` of the documents of the fit."""

    idf: dict[str, float]
    count: int
    seed: int

    @classmethod
    def fit(cls, documents: Sequence[Document], count: int, seed: int) -> QueryGenerator:
        """Document frequencies of ``documents``; terms that occur in none of them never stand in a pseudo-query."""
        return cls(KeyPhrases(documents).idf, count, seed)

    def __call__(self, document: Document) -> list[str]:
        """``count`` pseudo-queries, the same for a document whatever stands beside it."""
        phrases = KeyPhrases(())
        phrases.idf = self.idf
        return phrases.sample(body(document), self.count, generator(self.seed, GENERATED, document.id))


def raw_streams(
    view: str,
    documents: Sequence[Document],
    tokenizer: StaticEmbedding,
    max_len: int,
    queries: QueryGenerator | None = None,
) -> list[np.ndarray]:
    """A view's stream i64[·] of each document, marks as they are and token t as FIRST + t.

    Title keys hold at most the ``max_len`` leading tokens of a title. ``queries`` makes those of the view ``query``.
    """
    if view == "query":
        if queries is None:
            raise ValueError("view query needs its generator")
        return [_parts(tokenizer.encode(queries(document))) for document in documents]
    titles = tokenizer.encode(["" if view == "body" else d.title for d in documents])
    texts = tokenizer.encode(["" if view == "title" else d.text for d in documents])
    return [_stream(title, text, max_len) for title, text in zip(titles, texts, strict=True)]


def _parts(ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Texts with a BREAK behind each, and at least one."""
    parts = [np.append(np.array(row, np.int64) + FIRST, BREAK) for row in ids if len(row)]
    return np.concatenate(parts) if parts else np.array([BREAK], np.int64)


def _stream(title: Sequence[int], text: Sequence[int], max_len: int) -> np.ndarray:
    lead, rest = np.array(title[:max_len], np.int64) + FIRST, np.array(title[max_len:], np.int64) + FIRST
    parts = [np.concatenate([[TITLE], lead, [TITLE_END]])] if len(lead) else []
    if len(rest):
        parts.append(np.append(rest, TITLE_END))
    return np.concatenate([*parts, np.array(text, np.int64) + FIRST, [BREAK]]).astype(np.int64)
