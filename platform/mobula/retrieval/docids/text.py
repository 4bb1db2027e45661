"""Docids made of a document's own tokens (families ``text.title``, ``text.lead``, ``text.keywords``).

The output vocabulary is the set of tokens that occur in the docid of some document of the fit. Code 0 is EOS,
which pads every docid to L; code j > 0 is token ``vocabulary[j]`` (entry 0 is -1, no token). A document that
arrives later is described by the tokens of that vocabulary alone (others are skipped), so no code ever lies
outside the model's output; one without a single known token gets the all-EOS docid.
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
    """Sizes i32[L] (all K), the token of each code i64[K] and, for keywords, its idf f32[K]."""
    tokens = _source(family, documents, tokenizer)
    if family == "text.keywords":
        idf = _idf(tokens)
        rows = [_keywords(row, levels, idf) for row in tokens]
    else:
        idf = {}
        rows = [row[:levels] for row in tokens]
    vocabulary = [NO_TOKEN, *sorted({token for row in rows for token in row})]
    arrays: dict[str, np.ndarray] = {"vocabulary": np.array(vocabulary, np.int64)}
    if family == "text.keywords":
        arrays["idf"] = np.array([idf.get(token, 0.0) for token in vocabulary], np.float32)
    return np.full(levels, len(vocabulary), np.int32), arrays


def encode(
    family: str,
    levels: int,
    arrays: dict[str, np.ndarray],
    documents: Sequence[Document],
    tokenizer: DocidTokenizer,
) -> np.ndarray:
    """Codes i32[N, L]: the first L known tokens, or the L known tokens of highest tf·idf."""
    code = {token: j for j, token in enumerate(arrays["vocabulary"].tolist())}
    idf = dict(zip(code, arrays["idf"].tolist(), strict=True)) if family == "text.keywords" else {}
    codes = np.full((len(documents), levels), EOS, np.int32)
    for i, row in enumerate(_source(family, documents, tokenizer)):
        known = [token for token in row if token in code]
        chosen = _keywords(known, levels, idf) if idf else known[:levels]
        codes[i, : len(chosen)] = [code[token] for token in chosen]
    return codes


def tokens(arrays: dict[str, np.ndarray], codes: np.ndarray) -> list[list[int]]:
    """The token ids of codes i32[N, L], EOS left out."""
    vocabulary = arrays["vocabulary"]
    return [vocabulary[row[row != EOS]].tolist() for row in codes]


def _source(family: str, documents: Sequence[Document], tokenizer: DocidTokenizer) -> list[list[int]]:
    if family == "text.title":
        return tokenizer.encode([d.title.strip() or d.text for d in documents])
    if family == "text.lead":
        return tokenizer.encode([d.text for d in documents])
    return tokenizer.encode([f"{d.title} {d.text}".strip() for d in documents])


def _idf(rows: Sequence[Sequence[int]]) -> dict[int, float]:
    counts = Counter(token for row in rows for token in set(row))
    # Stored as f32, so the fit must rank by the same rounded values or re-encoding could flip a near tie.
    return {token: float(np.float32(np.log(len(rows) / n))) for token, n in counts.items()}


def _keywords(row: Sequence[int], levels: int, idf: dict[int, float]) -> list[int]:
    """The ``levels`` tokens of highest tf·idf, rarest first; ties by token id."""
    frequency = Counter(row)
    best = sorted(frequency, key=lambda token: (-frequency[token] * idf[token], token))[:levels]
    return sorted(best, key=lambda token: (-idf[token], token))
