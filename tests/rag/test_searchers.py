"""A served retriever as a searcher: one request a batch, its limits, and servers that answer otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobula.data.records import Document
from mobula.errors import ConfigError, DataError
from mobula.rag import searchers
from mobula.rag.search import Retrying, SearchFailed
from mobula.rag.searchers import SearchConfig, ServedSearcher, StoredCorpus, open_corpus, searcher_of, write_documents
from mobula.retrieval.search import BadSearch
from tests.rag.server import Server, serving
from tests.serving.asgi import make
from tests.serving.console import served
from tests.serving.toy import TEXTS

DOCUMENTS = [Document(id, title, text) for id, (title, text) in TEXTS.items()]


def passages(request: dict[str, Any]) -> tuple[int, Any]:
    """As Search-R1's server answers: no page that it did not find, contents with the title on their first line."""
    items = [
        {"document": {"id": f"w{i}", "contents": f'"Title {i}"\nText {i}.'}, "score": 1.0 / i}
        for i in range(1, request["topk"] + 1)
    ]
    return 200, {"result": [items for _ in request["queries"]]}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(passages) as running:
        yield running


def test_our_retriever_is_a_searcher(tmp_path: Path) -> None:
    app, _ = make(tmp_path)
    with served(app) as address:
        searcher = ServedSearcher(address, DOCUMENTS)
        found, other = searcher.search(["warm seas", "dogs bark"], 2)
        assert [(one.id, one.rank) for one in found] == [("d3", 1), ("d4", 2)] and other[0].id == "d2"
        assert searcher.document("d3").text == TEXTS["d3"][1] and searcher.size == 4
        with pytest.raises(BadSearch, match="k=0"):
            searcher.search(["warm seas"], 0)
        with pytest.raises(BadSearch, match=r"status 422.*topk"):
            searcher.search(["warm seas"], 101)
        with pytest.raises(DataError, match="'d3', which is not in the corpus here: it searches another one"):
            ServedSearcher(address, [DOCUMENTS[0], DOCUMENTS[1]]).search(["warm seas"], 2)
        assert ServedSearcher(f"{address}/retrieve", DOCUMENTS).hash == searcher.hash
        theirs = ServedSearcher(address)
        theirs.search(["warm seas"], 1)
        assert theirs.document("d3") == DOCUMENTS[2] and theirs.size is None
    (reply,) = Retrying(searcher, retries=1, backoff_s=0.001).ask(["warm seas"], 2)
    assert reply.failed


def test_a_batch_is_one_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = ServedSearcher(server.url)
    server.asked.clear()
    lists = searcher.search(["a", "b", "c"], 2)
    assert server.asked == [{"path": "/retrieve", "queries": ["a", "b", "c"], "topk": 2, "return_scores": True}]
    assert [[(hit.id, hit.score, hit.rank) for hit in hits] for hits in lists] == [[("w1", 1.0, 1), ("w2", 0.5, 2)]] * 3
    assert searcher.search([], 2) == [] and len(server.asked) == 1
    monkeypatch.setattr(searchers, "AT_ONCE", 2)
    assert searcher.search(["a", "b", "c"], 2) == lists
    assert [request["queries"] for request in server.asked[1:]] == [["a", "b"], ["c"]]


def test_passages_of_a_servers_corpus_are_those_that_it_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = ServedSearcher(server.url)
    searcher.search(["a"], 3)
    assert searcher.document("w2") == Document("w2", "Title 2", "Text 2.")
    with pytest.raises(DataError, match=r"'w9' is none that .* has found"):
        searcher.document("w9")
    monkeypatch.setattr(searchers, "SEEN", 2)
    searcher.search(["a"], 4)
    assert searcher.document("w4").title == "Title 4"
    with pytest.raises(DataError):
        searcher.document("w1")


@pytest.mark.parametrize(
    ("status", "body", "error", "reason"),
    [
        (500, {}, SearchFailed, "500"),
        (429, {}, SearchFailed, "429"),
        (422, {"error": {"message": "no"}}, BadSearch, "refuses with status 422: .*no"),
        (401, "a key", BadSearch, "status 401"),
        (404, "", BadSearch, "404"),
        (200, {"hits": []}, SearchFailed, "KeyError: 'result'"),
        (200, {"result": []}, SearchFailed, "0 lists for 1 queries"),
        (200, {"result": [[{"id": "w", "contents": "x"}]]}, SearchFailed, "'document'"),
        (200, {"result": [[{"document": {"id": "w"}, "score": 1}]]}, SearchFailed, "'contents'"),
        (200, [], SearchFailed, "TypeError"),
    ],
)
def test_what_answers_otherwise_is_an_error(
    server: Server, status: int, body: Any, error: type[Exception], reason: str
) -> None:
    searcher = ServedSearcher(server.url)
    server.answer = lambda request: (status, body)
    with pytest.raises(error, match=reason):
        searcher.search(["a"], 1)
    with pytest.raises(error, match=reason):
        ServedSearcher(server.url)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(SearchFailed, match="ConnectError"):
        ServedSearcher("http://127.0.0.1:1")


def test_a_document_without_a_score_stands_last(server: Server) -> None:
    searcher = ServedSearcher(server.url)
    document = {"id": "w", "contents": "x"}
    server.answer = lambda request: (200, {"result": [[{"document": document, "score": None}]]})
    assert searcher.search(["a"], 1)[0][0].score == float("-inf")


def test_a_key_comes_from_the_variable_that_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SearchConfig(url=server.url, url_key="RETRIEVER_KEY")
    monkeypatch.delenv("RETRIEVER_KEY", raising=False)
    with pytest.raises(ConfigError, match="RETRIEVER_KEY is not set"):
        searcher_of(config, None)
    monkeypatch.setenv("RETRIEVER_KEY", "secret-of-the-server")
    searcher_of(config, None)
    assert server.keys == ["Bearer secret-of-the-server"]
    assert SearchConfig(url_key="X").problems() == ["url_key has no effect without url"]


def test_a_config_says_who_searches(server: Server, tmp_path: Path) -> None:
    config = SearchConfig(kind="bm25")
    with pytest.raises(DataError, match=r"add corpus.jsonl to data.path, or .*retrieve.url"):
        open_corpus(StoredCorpus(tmp_path), config)
    write_documents(tmp_path, DOCUMENTS)
    opened = open_corpus(StoredCorpus(tmp_path), config)
    assert opened.search(["manta rays"], 1)[0][0].id == "d3" and opened.size == 4
    assert open_corpus(StoredCorpus(tmp_path), SearchConfig(kind="bm25")) is opened
    assert open_corpus(StoredCorpus(tmp_path / "none"), SearchConfig(url=server.url)).size is None
