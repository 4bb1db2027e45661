"""Dense retrieval with a flat index."""

import numpy as np
import pytest

from mobula.data import Document
from mobula.errors import DataError
from mobula.models.encoders import load_encoder
from mobula.retrieval.dense import Dense
from mobula.retrieval.search import SearchOptions

WORDS = ["cat", "dog", "house", "stock market", "rain", "music", "engine", "river"]
DOCUMENTS = [Document(f"d{i}", "", f"about {word}") for i, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("wordllama")


def test_hits_are_the_inner_products_in_order(encoder):
    retriever = Dense(encoder, DOCUMENTS)
    (result,) = retriever.search(["a kitten"], [SearchOptions(k=5)])
    products = encoder.embed([d.text for d in DOCUMENTS]) @ encoder.embed(["a kitten"])[0]
    order = np.argsort(-products)[:5]
    assert [hit.doc_id for hit in result.hits] == [f"d{i}" for i in order]
    assert np.allclose([hit.score for hit in result.hits], products[order], atol=1e-6)


def test_lists_are_full_and_ties_are_in_corpus_order(encoder):
    twins = [Document(f"t{i}", "", "about cat") for i in range(30)]
    retriever = Dense(encoder, twins)
    (short,) = retriever.search(["cat"], [SearchOptions(k=7)])
    assert [hit.doc_id for hit in short.hits] == [f"t{i}" for i in range(7)]
    (whole,) = retriever.search(["cat"], [SearchOptions(k=100)])
    assert [hit.doc_id for hit in whole.hits] == [f"t{i}" for i in range(30)]


def test_result_does_not_depend_on_the_batch(encoder):
    retriever = Dense(encoder, DOCUMENTS)
    texts = [f"{word} {i}" for i in range(5) for word in WORDS]
    together = retriever.search(texts, [SearchOptions(k=1 + i % 8) for i in range(len(texts))])
    for i, text in enumerate(texts):
        (alone,) = retriever.search([text], [SearchOptions(k=1 + i % 8)])
        assert alone.hits == together[i].hits


def test_given_embeddings_are_used(encoder):
    embeddings = np.roll(encoder.embed([d.text for d in DOCUMENTS]), 1, axis=0)
    (result,) = Dense(encoder, DOCUMENTS, embeddings).search(["about cat"], [SearchOptions(k=1)])
    assert result.hits[0].doc_id == "d1"


def test_insert_adds_documents(encoder):
    retriever = Dense(encoder, DOCUMENTS)
    assert retriever.insert([Document("new", "", "volcano eruption")]) == 1
    (result,) = retriever.search(["volcano eruption"], [SearchOptions(k=20)])
    assert result.hits[0].doc_id == "new" and len(result.hits) == 9
    with pytest.raises(DataError, match="'new' is already in the corpus"):
        retriever.insert([Document("new", "", "x")])


def test_remove_leaves_the_others_in_their_order(encoder):
    retriever = Dense(encoder, DOCUMENTS)
    assert retriever.remove(["d0", "d5"]) == 1
    kept = [d for d in DOCUMENTS if d.id not in ("d0", "d5")]
    for text in ("about cat", "music", "a river in the rain"):
        (result,), (expected,) = (r.search([text], [SearchOptions(k=20)]) for r in (retriever, Dense(encoder, kept)))
        assert result.hits == expected.hits
    with pytest.raises(DataError, match="'d0' is not in the corpus"):
        retriever.remove(["d1", "d0"])
    retriever.insert([DOCUMENTS[0]])
    (result,) = retriever.search(["about cat"], [SearchOptions(k=20)])
    assert result.hits[0].doc_id == "d0" and len(result.hits) == 7
    retriever.remove([hit.doc_id for hit in result.hits])
    assert retriever.search(["about cat"], [SearchOptions(k=20)])[0].hits == []
