from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mobula.retrieval.docids.scoring import scores_from_table, top_k


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), shape=st.tuples(*[st.integers(1, 6)] * 4))
def test_scores_are_sums_over_levels(seed: int, shape: tuple[int, int, int, int]) -> None:
    batch, levels, codes, documents = shape
    random = np.random.default_rng(seed)
    tables = random.standard_normal((batch, levels, codes)).astype(np.float32)
    rows = random.integers(0, codes, (documents, levels)).astype(np.int32)
    expected = [[sum(tables[b, i, c] for i, c in enumerate(row)) for row in rows] for b in range(batch)]
    np.testing.assert_allclose(scores_from_table(tables, rows), expected, rtol=1e-5, atol=1e-5)


def test_documents_of_equal_code_tie_exactly() -> None:
    tables = np.random.default_rng(0).standard_normal((1, 8, 32)).astype(np.float32)
    rows = np.repeat(np.random.default_rng(1).integers(0, 32, (50, 8)), 3, axis=0)
    scores = scores_from_table(tables, rows)[0].reshape(50, 3)
    assert (scores == scores[:, :1]).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 60), distinct=st.integers(1, 5))
def test_top_k_breaks_ties_by_corpus_order(seed: int, k: int, distinct: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, distinct, (2, 40)).astype(np.float32)
    scores[0, :3] = -np.inf
    live = random.random(40) < 0.7
    rows, best = top_k(scores, k, live)
    for b in range(2):
        expected = sorted(np.flatnonzero(live), key=lambda d: (-scores[b, d], d))[:k]
        assert rows[b].tolist() == expected
        assert best[b].tolist() == scores[b, expected].tolist()
