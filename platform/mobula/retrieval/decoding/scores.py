"""Likelihoods of codes beyond the one-pass table (:meth:`Corpus.scores`): Monte-Carlo bound and chain rule.

C codes, L levels, K codes a level, m draws. -1 is [MASK].
"""

from __future__ import annotations

import numpy as np

from mobula.retrieval.decoding.batched_calls import Decoding


def draw_masks(levels: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Masks bool[m, L] with l ~ U{1..L} masked positions, l stratified over the draws, positions uniform."""
    uniform = (np.arange(draws) + rng.random(draws)) / draws
    counts = np.minimum((uniform * levels).astype(np.int64), levels - 1) + 1
    ranks = rng.random((draws, levels)).argsort(1).argsort(1)
    return ranks < counts[:, None]


def bound(log_probs: np.ndarray, code: np.ndarray, masks: np.ndarray) -> float:
    """(1/m) sum (L/l) sum_{i masked} log p(c_i | z, q) from log_probs f64[m, L, K] under masks bool[m, L].

    Over all masks this is the average over all orders of the chain rule's log-likelihood (LLaDA, eq. 6;
    spec 3.3), a lower bound of log p(c | q) in expectation.
    """
    levels = len(code)
    taken = log_probs[:, np.arange(levels), code]
    # where, not a product: log p of a visible position may be -inf.
    per_draw = np.where(masks, taken, 0.0).sum(1) * levels / masks.sum(1)
    return float(per_draw.mean())


def monte_carlo(codes: np.ndarray, draws: int, rng: np.random.Generator) -> Decoding[np.ndarray]:
    """The Monte-Carlo bound f64[C] of codes i64[C, L] in one call of C*m rows; all codes share the masks."""
    masks = draw_masks(codes.shape[1], draws, rng)
    z = np.where(masks, -1, codes[:, None, :])
    log_probs = yield z.reshape(-1, codes.shape[1])
    per_code = log_probs.reshape(len(codes), draws, *log_probs.shape[1:])
    return np.array([bound(table, code, masks) for table, code in zip(per_code, codes, strict=True)])


def chain(codes: np.ndarray, first: np.ndarray) -> Decoding[np.ndarray]:
    """sum_l log p(c_l | c_{<l}, rest masked, q), f64[C], in one call of C*(L-1) rows.

    ``first`` f64[L, K] is the table with everything masked, which holds the first factor.
    """
    count, levels = codes.shape
    scores = first[0, codes[:, 0]].copy()
    if levels == 1:
        return scores
    visible = np.arange(levels) < np.arange(1, levels)[:, None]
    z = np.where(visible, codes[:, None, :], -1)
    log_probs = (yield z.reshape(-1, levels)).reshape(count, levels - 1, levels, -1)
    for level in range(1, levels):
        scores += log_probs[np.arange(count), level - 1, level, codes[:, level]]
    return scores
