"""Ranking every document from one table of log-probabilities.

Shapes: batch B, levels L, codes K, documents N.
"""

from __future__ import annotations

import numpy as np


def scores_from_table(table_logprobs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """s(d) = sum over levels of table[b, l, c_l(d)], f32[B, N]; tables f32[B, L, K], codes i32[N, L].

    On a hot path call :func:`scores_from_columns` with ``DocidTable.columns``, which spares the transposition.
    """
    return scores_from_columns(table_logprobs, np.ascontiguousarray(codes.T, dtype=np.int64))


def scores_from_columns(table_logprobs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """As :func:`scores_from_table`, from codes by level i64[L, N] (contiguous)."""
    batch, levels, _ = table_logprobs.shape
    scores = np.zeros((batch, columns.shape[1]), np.float32)
    picked = np.empty(columns.shape[1], np.float32)
    tables = np.ascontiguousarray(table_logprobs, dtype=np.float32)
    for b in range(batch):
        for level in range(levels):
            # mode="clip" lets numpy write straight into the buffer; codes are in range by construction.
            np.take(tables[b, level], columns[level], out=picked, mode="clip")
            scores[b] += picked
    return scores


def top_k(scores: np.ndarray, k: int, live: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows i64[B, k'] and scores f32[B, k'] of the best documents, k' = min(k, live documents).

    Ties go to the document that comes first in the corpus, also at the k-th place. ``scores`` f32[B, N],
    ``live`` bool[N].
    """
    candidates = np.arange(scores.shape[1]) if live is None else np.flatnonzero(live)
    k = min(k, len(candidates))
    best = np.empty((len(scores), k), np.int64)
    for b, row in enumerate(scores if live is None else scores[:, candidates]):
        best[b] = candidates[_top(row, k)]
    return best, np.take_along_axis(scores, best, axis=1)


def _top(row: np.ndarray, k: int) -> np.ndarray:
    if k == 0:
        return np.zeros(0, np.int64)
    least = np.partition(row, len(row) - k)[len(row) - k]
    above = np.flatnonzero(row > least)
    tied = np.flatnonzero(row == least)[: k - len(above)]
    chosen = np.concatenate([above, tied])
    return chosen[np.lexsort((chosen, -row[chosen]))]
