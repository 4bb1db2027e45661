import numpy as np
import pytest

from mobula.retrieval.dynamic.multi import aggregate

# Chunks: two of document 0 with equal codes, one more of it, one of document 1, two of document 2.
OWNERS = np.array([0, 0, 0, 1, 2, 2])
CODES = np.array([[1, 1], [1, 1], [2, 2], [1, 1], [3, 3], [4, 4]])
SCORES = np.log([0.2, 0.2, 0.1, 0.2, 0.15, 0.15])


@pytest.mark.parametrize(
    ("how", "values"),
    [("max", [0.2, 0.2, 0.15]), ("sumexp", [0.3, 0.2, 0.3]), ("top2", [(0.2 * 0.1) ** 0.5, 0.2, 0.15])],
)
def test_aggregation(how: str, values: list[float]) -> None:
    documents, found = aggregate(OWNERS, CODES, SCORES, how)
    assert documents.tolist() == [0, 1, 2]
    assert np.exp(found) == pytest.approx(values)


def test_the_three_rules_order_documents_differently() -> None:
    orders = {
        how: np.argsort(-aggregate(OWNERS, CODES, SCORES, how)[1], kind="stable").tolist()
        for how in ("max", "sumexp", "top2")
    }
    assert orders["max"][-1] == 2
    assert orders["sumexp"][-1] == 1
    assert orders["top2"][0] == 1


def test_documents_that_share_their_best_code_tie_exactly() -> None:
    _, found = aggregate(OWNERS, CODES, SCORES, "max")
    assert found[0] == found[1]
