"""BM25."""

import copy
import math

import numpy as np
import pytest

from mobula.data import DataConfig, Document, Query, load_retrieval
from mobula.environment import data_folder
from mobula.errors import DataError
from mobula.evaluation.ranking import per_query
from mobula.retrieval.lexical import GRID, Bm25, terms, tune
from mobula.retrieval.search import SearchOptions

DOCUMENTS = [
    Document("a", "Cats", "cats sleep"),
    Document("b", "", "a dog runs and a cat sleeps near the house"),
    Document("c", "", "stocks fell"),
    Document("d", "", ""),
]


def search(retriever, text, k=10):
    return [(hit.doc_id, hit.score) for hit in retriever.search([text], [SearchOptions(k=k)])[0].hits]


def test_stems_without_stop_words():
    assert terms("The cats are Sleeping, in 2 houses!") == ["cat", "sleep", "2", "hous"]


def test_scores_match_the_formula():
    k1, b = 1.2, 0.75
    hits = dict(search(Bm25(DOCUMENTS, k1, b), "cat"))
    lengths = np.array([len(terms(f"{d.title} {d.text}")) for d in DOCUMENTS])
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    for id, tf, length in (("a", 2, lengths[0]), ("b", 1, lengths[1])):
        expected = idf * tf / (tf + k1 * (1 - b + b * length / lengths.mean()))
        assert hits[id] == pytest.approx(expected, rel=1e-5)
    assert hits["c"] == hits["d"] == 0


def test_lists_are_full_and_ties_are_in_corpus_order():
    retriever = Bm25(DOCUMENTS)
    assert [id for id, _ in search(retriever, "unknownword")] == ["a", "b", "c", "d"]
    assert [id for id, _ in search(retriever, "stocks", k=3)] == ["c", "a", "b"]
    assert [id for id, _ in search(retriever, "the", k=2)] == ["a", "b"]


def test_insert_rebuilds_the_statistics():
    retriever = Bm25(DOCUMENTS)
    before = dict(search(retriever, "cat"))["a"]
    added = [Document(f"n{i}", "", "cat cat") for i in range(5)]
    assert retriever.insert(added) == 1
    after = dict(search(retriever, "cat"))
    assert len(after) == 9 and after["n0"] > 0 and after["a"] < before
    assert after == dict(search(Bm25([*DOCUMENTS, *added]), "cat"))
    with pytest.raises(DataError, match="'a' is already in the corpus"):
        retriever.insert([Document("a", "", "x")])


def test_remove_leaves_what_a_fresh_index_holds():
    retriever = Bm25([*DOCUMENTS, Document("e", "", "cat cat")])
    assert retriever.remove(["e", "b"]) == 1
    assert search(retriever, "cat") == search(Bm25([DOCUMENTS[0], *DOCUMENTS[2:]]), "cat")
    with pytest.raises(DataError, match="'nobody' is not in the corpus"):
        retriever.remove(["a", "nobody"])
    with pytest.raises(DataError, match="given twice"):
        retriever.remove(["a", "a"])
    assert len(search(retriever, "cat")) == 3
    assert retriever.insert([DOCUMENTS[1]]) == 2
    assert dict(search(retriever, "cat")) == dict(search(Bm25(DOCUMENTS), "cat"))


def test_everything_can_be_removed():
    retriever = Bm25(DOCUMENTS)
    retriever.remove(["a", "b", "c"])
    assert search(retriever, "cat") == [("d", 0.0)]
    retriever.remove(["d"])
    assert search(retriever, "cat") == []
    retriever.insert([Document("n", "", "cat")])
    assert [id for id, _ in search(retriever, "cat")] == ["n"]


def test_copy_goes_its_own_way():
    retriever = Bm25(DOCUMENTS)
    other = copy.copy(retriever)
    other.remove(["a"])
    assert (len(search(retriever, "cat")), len(search(other, "cat"))) == (4, 3)


def test_parameters_are_chosen_on_dev_and_every_value_is_kept():
    documents = [Document(str(i), "", f"word{i} " * (1 + i % 4) + "filler " * (i % 7)) for i in range(40)]
    dev = [Query(str(i), f"word{i} filler", (str(i),)) for i in range(40)]
    retriever, values = tune(documents, dev)
    assert set(values) == set(GRID) == {(k1, b) for k1 in (0.9, 1.2, 1.6) for b in (0.4, 0.75)}
    assert values[retriever.k1, retriever.b] == max(values.values())
    direct = Bm25(documents, retriever.k1, retriever.b)
    assert search(retriever, "word3 filler") == search(direct, "word3 filler")


def test_a_corpus_without_words_is_refused():
    with pytest.raises(DataError, match="at least one word"):
        Bm25([Document("a", "", "the of")])


def test_functions_baseline_is_not_broken():
    """Plain BM25 with stems over name, description and parameters: Hit@1 0.59, Hit@10 0.86 on all requests."""
    data = load_retrieval(DataConfig(), quiet=True)
    queries = [query for found in data.queries.values() for query in found]
    results = Bm25(data.documents).search([q.text for q in queries], [SearchOptions(k=10)] * len(queries))
    values = per_query([r.hits for r in results], queries, documents=len(data.documents))
    assert values["Hit@1"].mean() > 0.585
    assert values["Hit@10"].mean() > 0.86


@pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
def test_scifact_baseline_is_not_broken():
    """Published BM25 on the 300 test claims: nDCG@10 0.665-0.679."""
    data = load_retrieval(DataConfig(name="scifact"), quiet=True)
    queries = data.queries["test"]
    results = Bm25(data.documents).search([q.text for q in queries], [SearchOptions(k=10)] * len(queries))
    values = per_query([r.hits for r in results], queries, documents=len(data.documents))
    assert values["nDCG@10"].mean() >= 0.66
