"""Ranking measures and run files."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from mobula.data.records import Query
from mobula.errors import DataError
from mobula.evaluation import ranking
from mobula.evaluation.ranking import UnequalWidth, per_query


@dataclass(frozen=True)
class Found:
    doc_id: str
    score: float


def ranked(scores):
    return [Found(f"d{i}", s) for i, s in sorted(enumerate(scores), key=lambda p: -p[1])]


def gold_ranks(scores: np.ndarray, gold: list[list[int]]) -> np.ndarray:
    """Brute force: pessimistic rank i64[Q] of the best gold document, from scores f[Q, N] of the whole corpus."""
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, (values, relevant) in enumerate(zip(scores, gold, strict=True)):
        best = values[list(relevant)].max()
        ranks[row] = 1 + int((values >= best).sum()) - int((values[list(relevant)] >= best).sum())
    return ranks


def test_measures_match_their_definitions():
    query = Query("q", "?", ("d3", "d7"), (1, 3))
    hits = ranked([-float(i) for i in range(20)])
    values = per_query([hits], [query], documents=20)
    assert {name: value[0] for name, value in values.items() if name.startswith("Hit")} == {
        "Hit@1": 0,
        "Hit@5": 1,
        "Hit@10": 1,
        "Hit@100": 1,
    }
    assert values["MRR@10"][0] == pytest.approx(1 / 4)
    gain = 1 / math.log2(5) + 3 / math.log2(9)
    assert values["nDCG@10"][0] == pytest.approx(gain / (3 + 1 / math.log2(3)))


def test_mrr_is_cut_off():
    hits = ranked([-float(i) for i in range(150)])[:100]
    values = per_query([hits], [Query("q", "?", ("d49",))], documents=150)
    assert values["MRR@10"][0] == 0
    assert values["MRR@100"][0] == pytest.approx(1 / 50)


def test_ties_pessimistic_on_documents():
    """A bucket of 75 documents with one gold counts rank 75, wherever the list puts the gold."""
    query = Query("q", "?", ("d0",))
    whole = ranked([1.0] * 75 + [0.0] * 125)
    assert whole[0].doc_id == "d0"
    values = per_query([whole[:100]], [query], documents=200)
    assert values["MRR@100"][0] == pytest.approx(1 / 75)
    assert values["Hit@10"][0] == 0
    assert gold_ranks(np.array([[1.0] * 75 + [0.0] * 125]), [[0]]).tolist() == [75]
    # A list cut off inside the bucket says nothing better.
    assert per_query([whole[:10]], [query], documents=200, measures=["Hit@10"])["Hit@10"][0] == 0
    # A gold that stands last but ties with nothing in sight keeps its rank.
    last = ranked([1.0] + [2.0 + i for i in range(9)])
    assert per_query([last], [query], documents=200, measures=["Hit@10"])["Hit@10"][0] == 1


def test_list_measures_agree_with_ranks_from_scores():
    random = np.random.default_rng(0)
    scores = random.integers(0, 30, size=(40, 60)).astype(float)
    queries = [Query(str(i), "?", tuple(f"d{j}" for j in random.choice(60, 2, replace=False))) for i in range(40)]
    gold = [[int(id[1:]) for id in query.gold] for query in queries]
    ranks = gold_ranks(scores, gold)
    values = per_query([ranked(row) for row in scores], queries, documents=60)
    assert np.array_equal(values["Hit@5"], ranks <= 5)
    assert np.allclose(values["MRR@100"], 1 / ranks)


def test_equal_width_guard():
    query = Query("q", "?", ("d0",))
    hits = ranked([float(i) for i in range(10)])
    with pytest.raises(UnequalWidth, match="Hit@100 needs 100 candidates"):
        per_query([hits], [query], documents=500, measures=["Hit@100"])
    # Lists filled up to 100 from elsewhere do not make a beam of 10 wider.
    filled = ranked([float(i) for i in range(100)])
    with pytest.raises(UnequalWidth):
        per_query([filled], [query], documents=500, measures=["Hit@100"], width=10)
    assert set(per_query([filled], [query], documents=500, width=10)) == {
        "Hit@1",
        "Hit@5",
        "Hit@10",
        "MRR@10",
        "nDCG@10",
    }
    assert "Hit@100" in per_query([hits], [query], documents=10)
    assert ranking.width_note(("beam", "one pass"), (10, 100)) == (
        "unequal candidate width: beam ranked 10, one pass 100"
    )
    assert ranking.width_note(("a", "b"), (10, 10)) == ""


def test_a_document_named_twice_is_refused():
    with pytest.raises(DataError, match="twice"):
        per_query([[Found("a", 1.0), Found("a", 0.5)]], [Query("q", "?", ("a",))], documents=2)


def test_run_files_round_trip(tmp_path):
    hits = [[Found("a", 0.1 + 0.2), Found("b", -1.0)], [Found("c", 1e-9)]]
    queries = [Query("q1", "?", ("a",)), Query("q2", "?", ("c",))]
    ranking.write_run(tmp_path / "x.run", hits, queries, "bm25")
    assert (tmp_path / "x.run").read_text().splitlines()[1] == "q1 Q0 b 2 -1.0 bm25"
    assert ranking.read_run(tmp_path / "x.run") == {"q1": [("a", 0.1 + 0.2), ("b", -1.0)], "q2": [("c", 1e-9)]}


def test_run_files_refuse_what_they_cannot_carry(tmp_path):
    with pytest.raises(DataError, match="white space"):
        ranking.write_run(tmp_path / "x.run", [[Found("a b", 1.0)]], [Query("q", "?", ("a b",))], "t")
    (tmp_path / "y.run").write_text("q Q0 d one 1.0 t\n")
    with pytest.raises(DataError, match="line 1"):
        ranking.read_run(tmp_path / "y.run")


def test_strata_select_queries():
    values = {"Hit@1": np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])}
    assert ranking.subset(values, [True, False, True])["Hit@1"].tolist() == [[1.0, 1.0], [0.0, 1.0]]
