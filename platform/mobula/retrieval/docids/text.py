"""Docids made of a document's own tokens (families ``text.title``, ``text.lead``, ``text.keywords``).

The output vocabulary is the set of tokens that occur in the docid of some document. Code 0 is EOS, which pads every
docid to L; code j > 0 is token ``vocabulary[j]`` (entry 0 is -1, no token). A document that arrives later may bring
tokens that no docid had before: they are put behind the others, so no old code changes. Keywords are weighed by the idf
of the fit; a token that occurred in none of its N documents counts as log(N + 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mobula.data.records import Document

if TYPE_CHECKING:
    from mobula.retrieval.docids.space import DocidTokenizer

EOS = 0
NO_TOKEN = -1


def fit(
    family: str, levels: int, documents: Sequence[Document], tokenizer: DocidTokenizer
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sizes i32[L] (all K), the token of each code i64[K] and, for keywords, the idf of every token of the fit."""
    arrays: dict[str, np.ndarray] = {}
    if family == "text.keywords":
        arrays |= _idf(_source(family, documents, tokenizer))
    known = np.array([NO_TOKEN], np.int64)
    first = {token for row in docid_tokens(family, levels, arrays, documents, tokenizer) for token in row}
    arrays["vocabulary"] = np.append(known, sorted(first)).astype(np.int64)
    return np.full(levels, len(arrays["vocabulary"]), np.int32), arrays


def docid_tokens(
    family: str,
    levels: int,
    arrays: dict[str, np.ndarray],
    documents: Sequence[Document],
    tokenizer: DocidTokenizer,
) -> list[list[int]]:
    """The tokens of each document's docid: its first L, or the L of highest tf·idf."""
    rows = _source(family, documents, tokenizer)
    if family != "text.keywords":
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


def _source(family: str, documents: Sequence[Document], tokenizer: DocidTokenizer) -> list[list[int]]:
    if family == "text.title":
        return tokenizer.encode([d.title.strip() or d.text for d in documents])
    if family == "text.lead":
        return tokenizer.encode([d.text for d in documents])
    return tokenizer.encode([f"{d.title} {d.text}".strip() for d in documents])


def _idf(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Tokens i64[V] in order, the idf f32[V] of each, and the number of documents i64[1]."""
    counts = Counter(token for row in rows for token in set(row))
    found = sorted(counts)
    shares = [len(rows) / counts[token] for token in found]
    return {
        "idf_tokens": np.array(found, np.int64),
        "idf": np.log(shares).astype(np.float32),
        "idf_documents": np.array([len(rows)], np.int64),
    }


def _keywords(row: Sequence[int], levels: int, idf: dict[int, float]) -> list[int]:
    """The ``levels`` tokens of highest tf·idf, rarest first; ties by token id."""
    frequency = Counter(row)
    best = sorted(frequency, key=lambda token: (-frequency[token] * idf[token], token))[:levels]
    return sorted(best, key=lambda token: (-idf[token], token))
