"""Public test collections, read from MOBULA_DATA."""

import pytest

from mobula.data import DataConfig, load_retrieval
from mobula.data.classic import _holds, _month, _sentences
from mobula.data.pseudo_queries import body
from mobula.environment import data_folder
from mobula.errors import DataError

needs_data = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")


def load(name, **keys):
    return load_retrieval(DataConfig(name=name, **keys), quiet=True)


@needs_data
def test_scifact_is_the_set_beir_measures_on():
    data = load("scifact")
    assert len(data.documents) == 5183
    assert len(data.queries["test"]) == 300
    assert sum(len(query.gold) for query in data.queries["test"]) == 339
    dropped = data.notes["queries dropped as near-duplicates across splits"]
    assert len(data.queries["train"]) + len(data.queries["dev"]) + dropped == 809


@needs_data
def test_scifact_titles_ask_for_abstracts():
    data = load("scifact", queries="titles", max_documents=200, dev_windows=100)
    assert len(data.documents) == 200
    assert data.documents[0].id == "4983"
    assert all(document.title == "" for document in data.documents)
    assert (len(data.queries["dev"]), len(data.queries["test"])) == (100, 200)
    assert all(query.id == f"{query.gold[0]}#title" for query in data.queries["test"])


@needs_data
def test_scifact_keeps_every_cited_document_first():
    data = load("scifact", queries="titles", max_documents=1000, keep="relevant", dev_share=0.2)
    assert len(data.documents) == 1000
    assert data.notes["queries whose documents were cut off"] == 0
    assert (len(data.queries["dev"]), len(data.queries["test"]), len(data.queries["given"])) == (200, 800, 300)


@needs_data
def test_vaswani_tests_all_queries_and_holds_windows_out_for_dev():
    data = load("vaswani")
    assert len(data.documents) == 11429
    assert {split: len(found) for split, found in data.queries.items()} == {"train": 0, "dev": 200, "test": 93}
    titles = {document.id: document.title for document in data.documents}
    assert (titles["1"], titles["2"]) == ("compact memories have flexible capacities", "")
    texts = {document.id: body(document) for document in data.documents}
    assert all(query.text in " ".join(texts[query.gold[0]].split()) for query in data.queries["dev"])


@needs_data
def test_cranfield_join():
    data = load("cranfield")
    assert len(data.documents) == 1400
    assert len(data.queries["test"]) == 225
    third = next(query for query in data.queries["test"] if query.id == "3")
    # Numbered 4 in the XML; the judgements' query 3.
    assert third.text.startswith("what problems of heat conduction in composite slabs")
    assert {"5", "6", "90", "91"} <= set(third.gold)
    first = next(document for document in data.documents if document.id == "1")
    assert not first.text.startswith(first.title)


@needs_data
def test_nq_gold():
    data = load("nq")
    queries = [query for found in data.queries.values() for query in found]
    assert len(data.documents) == 4889
    dropped = data.notes["queries dropped as near-duplicates across splits"]
    assert len(queries) + dropped == 699
    assert not _holds("the cathedral", "cat")
    assert _holds("the Cat, sat", "cat")
    assert not _holds("in 10 days", "10")


@needs_data
def test_cacm_is_dated():
    data = load("cacm")
    assert len(data.documents) == 3204
    assert len(data.queries["test"]) == 52
    assert data.documents[0].date == "1958-12-01"
    assert all(document.date for document in data.documents)


def test_dates_and_printed_arrays():
    assert _month("CACM December, 1958") == "1958-12-01"
    assert _month("no date") is None
    assert _sentences("['It is 5.'\n \"It's 6.\"]") == ["It is 5.", "It's 6."]


def test_missing_set_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.delenv("MOBULA_DATA", raising=False)
    with pytest.raises(DataError, match="scifact not found: MOBULA_DATA is not set"):
        load("scifact")
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no doc-text\.trec in .*vaswani_npl"):
        load("vaswani")


def test_damaged_archive_is_an_error(tmp_path):
    (tmp_path / "scifact.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="not a ZIP archive"):
        load("scifact", path=str(tmp_path))
