"""Searchers: ranking, fusion, cache, self-test, retries, and a served retriever behind the same protocol."""

import threading
import time

import pytest

from mobula.data.records import Document
from mobula.errors import DataError
from mobula.rag.search import (
    Cached,
    Hit,
    IndexSelfTestError,
    Retrying,
    SearchFailed,
    batch_limit,
    open_searcher,
    self_test,
)
from mobula.retrieval.search import BadSearch

TOPICS = ["cats purr", "dogs bark loudly", "rain falls", "volcanoes erupt lava", "stock markets crash", "rivers flow"]
DOCUMENTS = [Document(f"d{i}", topic.split()[0], f"{topic} at place{i}") for i, topic in enumerate(TOPICS)]


class Constant:
    """Answers every query alike."""

    hash, size = "constant", len(DOCUMENTS)

    def __init__(self, fails: int = 0, hangs: float = 0.0):
        self.asked, self.fails, self.hangs = [], fails, hangs

    def search(self, queries, k):
        self.asked.append(list(queries))
        time.sleep(self.hangs)
        if len(self.asked) <= self.fails:
            raise SearchFailed("away")
        return [[Hit(f"d{i}", 1.0, i + 1) for i in range(k)] for _ in queries]

    def document(self, id):
        return DOCUMENTS[0]


@pytest.mark.parametrize("kind", ["bm25", "dense", "hybrid"])
def test_each_kind_finds_documents_by_their_words(kind):
    searcher = open_searcher(DOCUMENTS, kind, "wordllama")
    queries = [f"{document.title} at {document.text.split()[-1]}" for document in DOCUMENTS]
    lists = searcher.search(queries, 3)
    assert [found[0].id for found in lists] == [document.id for document in DOCUMENTS]
    for found in lists:
        assert [one.rank for one in found] == [1, 2, 3]
        assert found == sorted(found, key=lambda one: (-one.score, one.id))
    assert searcher.document("d3") == DOCUMENTS[3]


def test_equal_scores_are_ranked_by_id_whatever_the_order_of_the_corpus():
    others = [Document(f"e{i}", f"single{i}", "and nothing else") for i in range(20)]
    twins = [*others, *(Document(id, "", "of these words") for id in ("g", "f"))]
    for kind in ("bm25", "dense", "hybrid"):
        found = open_searcher(twins, kind, "wordllama").search(["of these words"], 2)[0]
        assert [one.id for one in found] == ["f", "g"]


def test_lists_are_fused_by_rank():
    lists = {
        kind: open_searcher(DOCUMENTS, kind, "wordllama").search(["rain and rivers"], 6)[0]
        for kind in ("bm25", "dense", "hybrid")
    }
    expected = {}
    for kind in ("bm25", "dense"):
        for one in lists[kind]:
            if one.score:  # no word of the query: BM25 says nothing of the document
                expected[one.id] = expected.get(one.id, 0) + 1 / (60 + one.rank)
    assert {one.id: one.score for one in lists["hybrid"]} == pytest.approx(expected)


def test_a_short_list_begins_a_longer_one_and_batches_change_nothing():
    searcher = open_searcher(DOCUMENTS, "hybrid", "wordllama")
    together = searcher.search(["rain", "dogs and cats"], 5)
    assert searcher.search(["dogs and cats"], 2)[0] == together[1][:2]
    assert searcher.search([], 2) == []


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_must_fit_the_corpus(k):
    with pytest.raises(BadSearch, match=f"k={k}: expected 1 to 6"):
        open_searcher(DOCUMENTS, "bm25").search(["cats"], k)


def test_what_cannot_be_a_corpus_is_refused():
    with pytest.raises(DataError, match="'colbert'; expected bm25, dense, hybrid"):
        open_searcher(DOCUMENTS, "colbert")
    for documents in ([], [*DOCUMENTS, DOCUMENTS[0]]):
        with pytest.raises(DataError, match="each with an id of its own"):
            open_searcher(documents, "bm25")
    with pytest.raises(DataError, match="'no' is not in the corpus"):
        open_searcher(DOCUMENTS, "bm25").document("no")


def test_the_hash_names_documents_and_back_end():
    changed = [*DOCUMENTS[:-1], Document("d5", "rivers", "rivers flow elsewhere")]
    hashes = {
        open_searcher(documents, kind, "wordllama").hash
        for documents in (DOCUMENTS, changed)
        for kind in ("bm25", "dense", "hybrid")
    }
    assert len(hashes) == 6
    assert open_searcher(DOCUMENTS[::-1], "bm25").hash in hashes


def test_an_index_that_answers_all_alike_fails_its_test():
    with pytest.raises(IndexSelfTestError, match="1 different ones come first"):
        self_test(Constant(), DOCUMENTS)


def test_lists_are_kept_by_query_and_k_and_the_oldest_go():
    inner = Constant()
    searcher = Cached(inner, size=2)
    searcher.search(["a", "b", "a"], 1)
    searcher.search(["a"], 1)
    searcher.search(["a"], 2)
    searcher.search(["b"], 1)  # gone: a with k=1 was used since
    assert inner.asked == [["a", "b"], [], ["a"], ["b"]]


def test_a_failing_searcher_is_asked_again():
    inner = Constant(fails=2)
    replies = Retrying(inner, backoff_s=0.001).ask(["a", "b"], 2)
    assert len(inner.asked) == 3
    assert [len(reply.hits) for reply in replies] == [2, 2] and not any(reply.failed for reply in replies)


def test_no_question_is_lost_when_nobody_answers():
    inner = Constant(fails=10)
    replies = Retrying(inner, retries=3, backoff_s=0.001).ask(["a", "b"], 2)
    assert len(inner.asked) == 4
    assert [(reply.hits, reply.failed) for reply in replies] == [([], True), ([], True)]


def test_a_late_answer_is_no_answer():
    started = time.monotonic()
    (reply,) = Retrying(Constant(hangs=5), timeout_s=0.05, retries=1, backoff_s=0.001).ask(["a"], 1)
    assert reply.failed and time.monotonic() - started < 2
    # What hangs keeps no process from ending.
    left = next(thread for thread in threading.enumerate() if thread.name == "search")
    assert left.daemon


def test_a_k_that_cannot_be_right_is_not_asked_again():
    with pytest.raises(BadSearch):
        Retrying(open_searcher(DOCUMENTS, "bm25"), backoff_s=0.001).ask(["cats"], 100)


def test_what_a_searcher_raises_otherwise_is_not_hidden():
    class Broken(Constant):
        def search(self, queries, k):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Retrying(Broken()).ask(["a"], 1)


def test_each_query_of_a_batch_has_its_time(monkeypatch):
    inner = Constant(hangs=0.2)
    replies = Retrying(inner, timeout_s=0.04, retries=0).ask(["q"] * 20, 1)
    assert not any(reply.failed for reply in replies)
    assert Retrying(inner, timeout_s=0.04, retries=0).ask(["q"], 1)[0].failed
    assert (batch_limit(30, 1), batch_limit(30, 4), batch_limit(30, 500), batch_limit(400, 3)) == (30, 120, 300, 400)
