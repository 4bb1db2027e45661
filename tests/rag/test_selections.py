"""Candidates of real questions, selections without a selector, and how answers are measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.errors import DataError
from mobula.rag.candidates import (
    RETRIEVER_ERROR,
    TOO_FEW,
    Candidates,
    Request,
    RetrieveConfig,
    divided,
    prepare,
    retrieve,
)
from mobula.rag.search import Hit, Retrying, SearchFailed
from mobula.rag.selections import labelled, measured, selected
from tests.rag.dro import small

TEXTS = ["Oslo is in Norway", "Lima is in Peru", "the capital Oslo", "Cairo", "Quito", "Dakar"]
DOCUMENTS = [Document(f"d{i}", f"t{i}", text) for i, text in enumerate(TEXTS)]
CANDIDATES = Candidates({}, DOCUMENTS, np.zeros((6, 2), dtype=np.float32))
# Shown in another order than the retriever's: ranks 3, 1, 2, 4.
REQUEST = Request("q", "where", ("Oslo",), (), ("d0", "d1", "d2", "d3"), (3, 1, 2, 4))


def with_support(*support: str) -> Request:
    return Request("q", "where", ("Oslo",), support, REQUEST.candidates, REQUEST.ranks)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("retriever", [1, 2]),
        ("first", [0, 1]),
        ("gold", [2, 0]),
        ("no_gold", [1, 3]),
        ("each", [0, 1, 2, 3]),
        ("none", []),
    ],
)
def test_selections_without_a_selector(how: str, expected: list[int]) -> None:
    assert selected(CANDIDATES, REQUEST, how, 2) == expected


def test_gold_is_what_the_set_says_or_what_holds_the_answer() -> None:
    assert CANDIDATES.gold(REQUEST) == [True, False, True, False]
    assert CANDIDATES.gold(with_support("d1")) == [False, True, False, False]
    assert selected(CANDIDATES, with_support("d3"), "gold", 3) == [3, 1, 2]  # filled as the retriever ranks


def one(request: Request, permutation: list[int], answer: str, k: int = 3) -> dict[str, Any]:
    return measured(CANDIDATES, request, permutation, answer, k)


def test_hits_recall_and_agreement() -> None:
    found = one(with_support("d0", "d3"), [1, 2, 3], "Oslo!")
    assert (found["exact"], found["f1"], found["acc"]) == (1, 1, 1)
    assert (found["hit@1"], found["hit@3"]) == (0, 1)
    assert (found["recall"], found["all_gold"]) == (0.5, 0)
    assert found["tau"] == 1 and found["random_hit@1"] == 0.5
    assert one(REQUEST, [3, 0, 1], "x")["tau"] == -1
    assert one(REQUEST, [1], "x")["recall"] is None


def test_the_retrievers_order_is_measured_by_the_same_function() -> None:
    found = one(REQUEST, selected(CANDIDATES, REQUEST, "retriever", 3), "")
    assert (found["hit@1"], found["hit@3"], found["tau"]) == (0, 1, 1)


def test_no_passage_is_expected_to_hold_yes_or_no() -> None:
    closed = Request("q", "is it", ("yes",), (), REQUEST.candidates, REQUEST.ranks)
    found = one(closed, [0, 1, 2], "yes")
    assert found["exact"] == 1
    assert found["hit@1"] is found["hit@3"] is found["random_hit@1"] is None


def test_a_question_without_candidates_counts_as_wrong() -> None:
    lost = Request("q", "where", ("Oslo",), ("d0",), (), (), RETRIEVER_ERROR)
    found = one(lost, [], "")
    assert [found[name] for name in ("exact", "f1", "acc", "hit@1", "hit@3", "recall", "all_gold")] == [0] * 7


def test_cold_starts_learn_supporting_passages_first_and_skip_what_has_none() -> None:
    nothing = Request("p", "who", ("nobody",), (), REQUEST.candidates, REQUEST.ranks)
    rows = labelled(CANDIDATES, [nothing, REQUEST], "selector", 3, 0)
    assert rows == [{"query": 1, "permutations": [[2, 0, 1]], "weights": [1.0]}]
    permutations = [labelled(CANDIDATES, [REQUEST], "generator", 3, seed)[0]["permutations"][0] for seed in range(40)]
    assert all({0, 2} < set(z) for z in permutations)
    # Where the supporting passages stand says nothing, and the third one differs.
    assert {z.index(2) for z in permutations} == {0, 1, 2}
    assert {next(i for i in z if i not in (0, 2)) for z in permutations} == {1, 3}


class Fixed:
    """Finds what it is told to, or fails."""

    hash, size = "fixed", 6

    def __init__(self, found: dict[str, int]) -> None:
        self.found = found

    def search(self, queries: Any, k: int) -> list[list[Hit]]:
        if any(query not in self.found for query in queries):
            raise SearchFailed("away")
        return [[Hit(f"d{i}", -i, i + 1) for i in range(min(k, self.found[query]))] for query in queries]

    def document(self, id: str) -> Document:
        return DOCUMENTS[int(id[1:])]


def retrieved(texts: dict[str, int], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[Request]:
    monkeypatch.setattr("mobula.rag.candidates.BATCH", 1)
    monkeypatch.setattr("mobula.rag.candidates.Retrying", partial(Retrying, retries=0))
    questions = [Question(str(i), text, ("a",), (), passages=("d1", "d3")) for i, text in enumerate([*texts, "lost"])]
    config = RetrieveConfig(candidates=5, choose=2, **keys)
    return retrieve(questions, Fixed(texts), config, 0)


def test_failures_of_the_retriever_are_kept_with_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few, lost = retrieved({"whole": 6, "few": 1}, monkeypatch)
    assert (len(whole.candidates), whole.flag) == (5, "")
    assert (few.candidates, few.flag) == ((), TOO_FEW)
    assert (lost.candidates, lost.flag) == ((), RETRIEVER_ERROR)


def test_candidates_are_shuffled_by_question_or_left_as_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = retrieved({f"q{i}": 6 for i in range(20)}, monkeypatch)[:-1]
    assert {one.ranks.index(1) for one in shuffled} == set(range(5))
    for one in shuffled:
        assert [one.candidates[one.ranks.index(rank)] for rank in range(1, 6)] == [f"d{i}" for i in range(5)]
    assert retrieved({"q3": 6}, monkeypatch)[0].ranks == shuffled[3].ranks
    (plain, _) = retrieved({"q3": 6}, monkeypatch, order="retriever")
    assert plain.ranks == (1, 2, 3, 4, 5)


def test_candidates_may_be_a_questions_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = retrieved({"q": 6}, monkeypatch, pool="own")[0]
    assert sorted(zip(found.ranks, found.candidates, strict=True)) == [(1, "d1"), (2, "d3")]


def test_splits_do_not_overlap_and_too_many_questions_are_refused() -> None:
    questions = [Question(str(i), f"q{i}", ("a",), ()) for i in range(20)]
    found = divided(questions, {"train": 12, "dev": 3, "test": 5}, 0)
    assert len({one.id for part in found.values() for one in part}) == 20
    with pytest.raises(DataError, match=r"train=12, dev=9 are 21 questions, but there are 20"):
        divided(questions, {"train": 12, "dev": 9}, 0)


def test_candidates_are_found_once(tmp_path: Path) -> None:
    small.write_nq(tmp_path)
    config = RetrieveConfig(encoder="wordllama", candidates=6, choose=2)
    sizes = {"train": 4, "dev": 2}
    found = prepare(tmp_path / "out", "nq", str(tmp_path), sizes, config, 0)
    assert (found.questions, found.passages, found.retriever_errors, found.too_few) == (6, 24, 0, 0)
    (tmp_path / "nq_generator_training.json").unlink()
    assert prepare(tmp_path / "out", "nq", str(tmp_path), sizes, config, 0) == found
