"""Docids made of a document's own tokens (families ``text.title``, ``text.lead``, ``text.keywords``).

The output vocabulary is the set of tokens that occur in the docid of some document. Code 0 is EOS, which pads every
docid to L; code j > 0 is token ``vocabulary[j]`` (entry 0 is -1, no token). A document that arrives later may bring
tokens that no docid had before: they are put behind the others, so no old code changes. Keywords are weighed by the idf
of the fit; a token that occurred in none of its N documents counts as log(N + 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mobula.data.records import Document

EOS = 0
NO_TOKEN = -1


class DocidTokenizer(Protocol):
    """What text families ask of a tokenizer."""

    hash: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


def title_or_lead(document: Document) -> str:
    """The title; of a document without one, the text."""
    return document.title.strip() or document.text


def lead(document: Document) -> str:
    """The text."""
    return document.text


def title_and_lead(document: Document) -> str:
    """Title and text."""
    return f"{document.title} {document.text}".strip()


def fit(rows: list[list[int]], levels: int, *, keywords: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sizes i32[L] (all K), the token of each code i64[K] and, for keywords, the idf of every token of the fit."""
    arrays: dict[str, np.ndarray] = _idf(rows) if keywords else {}
    known = np.array([NO_TOKEN], np.int64)
    first = {token for row in docids(rows, levels, arrays) for token in row}
    arrays["vocabulary"] = np.append(known, sorted(first)).astype(np.int64)
    return np.full(levels, len(arrays["vocabulary"]), np.int32), arrays


def docids(rows: list[list[int]], levels: int, arrays: dict[str, np.ndarray]) -> list[list[int]]:
    """The docid of each document with tokens ``rows``: the first L, or, with an idf, the L of highest tf·idf."""
    if "idf" not in arrays:
        return [row[:levels] for row in rows]
    idf = dict(zip(arrays["idf_tokens"].tolist(), arrays["idf"].tolist(), strict=True))
    unseen = float(np.log(arrays["idf_documents"].item() + 1))
    return [_keywords(row, levels, {token: idf.get(token, unseen) for token in row}) for row in rows]


def unseen(vocabulary: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens i64[m] of docids that are not in a vocabulary i64[K], in order."""
    return np.array(sorted({token for row in rows for token in row} - set(vocabulary.tolist())), np.int64)


def encode(vocabulary: np.ndarray, levels: int, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Codes i32[N, L] of docids given as tokens, all of the vocabulary i64[K]."""
    code = {token: j for j, token in enumerate(vocabulary.tolist())}
    codes = np.full((len(rows), levels), EOS, np.int32)
    for i, row in enumerate(rows):
        codes[i, : len(row)] = [code[token] for token in row]
    return codes


def tokens(vocabulary: np.ndarray, codes: np.ndarray) -> list[list[int]]:
    """The token ids of codes i32[N, L] of a vocabulary i64[K], EOS left out."""
    return [vocabulary[row[row != EOS]].tolist() for row in codes]


def _idf(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Tokens i64[V] in order, the idf f32[V] of each, and the number of documents i64[1]."""
    counts = Counter(token for row in rows for token in set(row))
    tokens = sorted(counts)
    shares = [len(rows) / counts[token] for token in tokens]
    return {
        "idf_tokens": np.array(tokens, np.int64),
        "idf": np.log(shares).astype(np.float32),
        "idf_documents": np.array([len(rows)], np.int64),
    }


def _keywords(row: Sequence[int], levels: int, idf: dict[int, float]) -> list[int]:
    """The ``levels`` tokens of highest tf·idf, rarest first; ties by token id."""
    frequency = Counter(row)
    best = sorted(frequency, key=lambda token: (-frequency[token] * idf[token], token))[:levels]
    return sorted(best, key=lambda token: (-idf[token], token))
