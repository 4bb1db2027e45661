import pytest

from mobula.retrieval.fusion import fuse
from mobula.retrieval.search import Hit, SearchResult


def _result(*hits: tuple[str, float], filled: int = 0) -> SearchResult:
    return SearchResult([Hit(*hit) for hit in hits], filled=filled)


NUMERIC = _result(("a", 3.0), ("b", 2.0), ("c", 1.0))
TEXT = _result(("c", 10.0), ("d", 0.0))


@pytest.mark.parametrize("rule", ["zscore", "rrf"])
def test_weights_at_the_ends_are_the_lists_themselves(rule: str) -> None:
    assert [hit.doc_id for hit in fuse(NUMERIC, TEXT, 1.0, 3, rule).hits] == ["a", "b", "c"]
    assert fuse(NUMERIC, TEXT, 0.0, 2, rule).hits[0].doc_id == "c"


def test_standardised_scores_by_hand() -> None:
    found = {hit.doc_id: hit.score for hit in fuse(NUMERIC, TEXT, 0.5, 4).hits}
    third = 1.5**0.5  # (3 - 2) / std of 3, 2, 1
    assert found["a"] == pytest.approx(0.5 * third - 0.5)
    assert found["c"] == pytest.approx(-0.5 * third + 0.5)
    assert found["d"] == pytest.approx(-0.5 * third - 0.5)  # each list's least where it lacks the document


def test_what_a_list_was_filled_with_does_not_count_as_found() -> None:
    filled = _result(("a", 3.0), ("b", 2.0), ("z", 1.0), filled=1)
    found = fuse(filled, TEXT, 1.0, 5, "rrf")
    scores = {hit.doc_id: hit.score for hit in found.hits}
    assert scores["z"] == scores["b"] < scores["a"]
    assert {hit.doc_id for hit in found.hits} == {"a", "b", "z", "c", "d"}
