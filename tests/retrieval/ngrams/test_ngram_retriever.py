"""N-gram retrieval over documents that are added while it serves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_ngrams import untrained

from mobula.data import RetrievalData
from mobula.data.records import Document
from mobula.errors import ArtifactError, DataError
from mobula.models.text import load_static
from mobula.retrieval.decoding.batched_calls import encode
from mobula.retrieval.ngrams.config import MULTIVIEW
from mobula.retrieval.ngrams.generate import generate
from mobula.retrieval.ngrams.language import MarkedInputs
from mobula.retrieval.ngrams.retriever import NgramRetriever, load
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Vocabulary, raw_streams
from mobula.retrieval.search import SearchOptions, SearchResult

VIEWS = {"plain": ["text"], "multiview": list(MULTIVIEW)}


def search(retriever: NgramRetriever, texts: list[str], k: int = 10) -> list[SearchResult]:
    return retriever.search(texts, [SearchOptions(k=k)] * len(texts))


def texts_of(data: RetrievalData, count: int) -> list[str]:
    return [query.text for query in data.queries["test"][:count]]


@pytest.fixture(scope="module", params=VIEWS)
def retriever(request: pytest.FixtureRequest, data: RetrievalData) -> NgramRetriever:
    return untrained(data.documents[:60], views=VIEWS[request.param])


def test_lists_are_full_and_distinct(retriever: NgramRetriever, data: RetrievalData) -> None:
    """Trap 17: never shorter than min(k, corpus), scores fall, the filled share is known."""
    known = set(retriever.doc_ids)
    for k in (1, 10, 60, 1000):
        for result in search(retriever, texts_of(data, 4), k):
            ids = [hit.doc_id for hit in result.hits]
            assert len(ids) == len(set(ids)) == min(k, 60)
            assert set(ids) <= known
            scores = [hit.score for hit in result.hits]
            assert scores == sorted(scores, reverse=True)
            assert result.filled == sum(score < 0 for score in scores)


def test_documents_without_a_key_fill_the_list_in_corpus_order(data: RetrievalData) -> None:
    """Trap 17: one document holds every n-gram there is; the others hold nothing."""
    documents = [Document(str(i), "", "") for i in range(5)]
    documents[3] = replace(data.documents[0], id="3")
    (result,) = search(untrained(documents), ["insulin"], 10)
    assert [hit.doc_id for hit in result.hits] == ["3", "0", "1", "2", "4"]
    assert result.filled == 4
    (nothing,) = search(untrained(documents[:3]), ["insulin"], 2)
    assert [hit.doc_id for hit in nothing.hits] == ["0", "1"]
    assert nothing.filled == 2


def test_results_do_not_depend_on_the_batch(retriever: NgramRetriever, data: RetrievalData) -> None:
    texts = texts_of(data, 19)
    together = search(retriever, texts)
    assert [search(retriever, [text])[0] for text in texts[:6]] == together[:6]
    assert search(retriever, texts[15:] + texts[:2]) == together[15:] + together[:2]


def test_no_weight_changes_on_insert(data: RetrievalData) -> None:
    """Trap 1: weights, and the rows of the codes that were there."""
    retriever = untrained(data.documents[:40])
    weights = {name: value.clone() for name, value in retriever.model.state_dict().items()}
    rows = [row.clone() for row in (retriever.speaker.inputs, retriever.speaker.outputs)]
    streams = retriever.indexes["text"].codes.copy()
    tokens = retriever.vocabulary.tokens.copy()
    assert retriever.insert(data.documents[40:50]) == 1
    assert retriever.insert(data.documents[50:60]) == 2
    after = retriever.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert len(retriever.vocabulary.tokens) > len(tokens)
    assert np.array_equal(retriever.vocabulary.tokens[: len(tokens)], tokens)
    present = retriever.speaker.inputs, retriever.speaker.outputs
    assert all(torch.equal(new[: len(old)], old) for new, old in zip(present, rows, strict=True))
    assert np.array_equal(retriever.indexes["text"].codes[: len(streams)], streams)
    assert retriever.doc_ids == [d.id for d in data.documents[:60]]


def test_inserted_documents_are_found_as_if_they_had_been_there(data: RetrievalData) -> None:
    """Trap 9: counts of every n-gram at t are those of an index built on D0..Dt, and so are results."""
    grown = untrained(data.documents[:40], views=list(MULTIVIEW))
    for begin in range(40, 60, 5):
        grown.insert(data.documents[begin : begin + 5])
    again = grown.restricted(grown.doc_ids)
    for view, index in grown.indexes.items():
        fresh = again.indexes[view]
        assert len(index.segments) == 5
        assert len(fresh.segments) == 1
        assert np.array_equal(index.codes, fresh.codes)
        assert index.tokens == fresh.tokens
    texts = texts_of(data, 6)
    assert search(grown, texts) == search(again, texts)


@pytest.mark.parametrize("embed", ["wordllama", "random"])
def test_new_token_admission(data: RetrievalData, embed: str) -> None:
    """Trap 22: a token that no document of the fit holds can be generated once a document holds it."""
    retriever = untrained(data.documents[:40], embed=embed)
    added = Document("new", "Zyzzyva weevil", "Zyzzyva zyzzyva weevil weevil snout")
    before = retriever.vocabulary.size
    retriever.insert([added])
    fresh = np.arange(before, retriever.vocabulary.size)
    assert len(fresh) > 0
    speaker = retriever.speaker
    memory = encode(speaker.network, retriever.inputs.features(["an insect"], "text"))
    with torch.inference_mode():
        hidden, _ = speaker.network.step(memory, speaker.network.start(memory, 1), None)
        probabilities = speaker.log_probs(hidden[0])[0].exp()
    assert len(probabilities) == retriever.vocabulary.size
    assert (probabilities[fresh] > 1e-9).all()
    index = retriever.indexes["text"]
    assert (index.frequencies[fresh] > 0).all()
    alone = retriever.restricted(["new"]).indexes["text"]
    (found,) = generate(speaker, memory, alone, width=50, max_len=3, together=1)
    of_fresh = np.isin(found.codes, fresh).any(1)
    assert of_fresh.any()
    assert np.isfinite(found.log_p[of_fresh]).all()
    assert (index.count([[c for c in row if c >= 0] for row in found.codes[of_fresh].tolist()]) > 0).all()


def test_unseen_tokens_get_the_mean_row_where_rows_are_trained(data: RetrievalData) -> None:
    retriever = untrained(data.documents[:40], embed="random")
    retriever.insert([Document("new", "", "Zyzzyva weevil")])
    outputs = retriever.speaker.outputs
    initial = retriever.vocabulary.initial
    mean = outputs[FIRST:initial].mean(0)
    assert torch.allclose(outputs[initial:], mean.expand(len(outputs) - initial, -1), atol=1e-4)


def test_known_ids_are_refused_and_nothing_changes(retriever: NgramRetriever, data: RetrievalData) -> None:
    before = retriever.doc_ids
    added = data.documents[60:62]
    for wrong in ([*added, data.documents[0]], [added[0], added[0]]):
        with pytest.raises(DataError, match="is already in the corpus"):
            retriever.insert(wrong)
    assert retriever.doc_ids == before


def test_restricted_finds_only_its_documents(retriever: NgramRetriever, data: RetrievalData) -> None:
    chosen = retriever.doc_ids[7:20]
    part = retriever.restricted(chosen)
    assert part.doc_ids == chosen
    assert part.bytes < retriever.bytes
    for result in search(part, texts_of(data, 3), 50):
        assert {hit.doc_id for hit in result.hits} == set(chosen)
    with pytest.raises(DataError, match="'nowhere' is not in the corpus"):
        retriever.restricted(["nowhere"])


def test_concurrent_add_and_search(data: RetrievalData) -> None:
    """Trap 21: every response is that of exactly one version."""
    documents = data.documents
    retriever = untrained(documents[:30])
    query = texts_of(data, 1)
    expected = [search(retriever, query, 100)]
    alone = untrained(documents[:30])
    for i in range(30, 42):
        alone.insert([documents[i]])
        expected.append(search(alone, query, 100))
    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search, retriever, query, 100) for _ in range(40)]
        for i in range(30, 42):
            assert retriever.insert([documents[i]]) == i - 29
        assert all(found.result() in expected for found in searches)
    assert search(retriever, query, 100) == expected[-1]


@pytest.mark.parametrize("embed", ["wordllama", "random"])
def test_saved_and_loaded(data: RetrievalData, tmp_path, embed: str) -> None:
    retriever = untrained(data.documents[:40], views=list(MULTIVIEW), embed=embed, most_frequent=None)
    retriever.insert([*data.documents[40:45], Document("new", "Zyzzyva weevil", "Zyzzyva snout")])
    retriever.save(tmp_path)
    again = load(tmp_path, name="multiview")
    assert again.name == "multiview"
    texts = texts_of(data, 5)
    assert search(again, texts) == search(retriever, texts)
    more = [Document("newer", "Weevil", "a zyzzyva's snout"), data.documents[50]]
    retriever.insert(more)
    again.insert(more)
    assert search(again, texts) == search(retriever, texts)
    facts = tmp_path / "ngrams.json"
    facts.write_text(facts.read_text().replace(load_static().hash, "0" * 64))
    with pytest.raises(ArtifactError, match="another tokenizer"):
        load(tmp_path)
    facts.write_text("{}")
    with pytest.raises(ArtifactError, match="no readable n-gram"):
        load(tmp_path)


def test_only_the_most_frequent_tokens_are_keys(data: RetrievalData) -> None:
    retriever = untrained(data.documents[:40], most_frequent=50)
    every = untrained(data.documents[:40])
    assert retriever.vocabulary.size == FIRST + 50
    codes, frequencies = every.vocabulary.tokens, every.indexes["text"].frequencies[FIRST:]
    counts = dict(zip(codes.tolist(), frequencies.tolist(), strict=True))
    least = min(counts[token] for token in retriever.vocabulary.tokens.tolist())
    assert sum(count > least for count in counts.values()) <= 50
    before = retriever.vocabulary
    retriever.insert(data.documents[40:45])
    assert retriever.vocabulary.size == before.size
    assert (retriever.indexes["text"].codes < before.size).all()


def test_streams_hold_marks_where_parts_end(data: RetrievalData) -> None:
    tokenizer = load_static()
    document = Document("a", "Insulin resistance", "Cells respond less")
    (title, text) = tokenizer.encode([document.title, document.text])
    raw = [raw_streams(view, [document], tokenizer, 99)[0].tolist() for view in ("text", "title", "body")]
    title, text = [FIRST + t for t in title], [FIRST + t for t in text]
    assert raw[0] == [TITLE, *title, TITLE_END, *text, BREAK]
    assert raw[1] == [TITLE, *title, TITLE_END, BREAK]
    assert raw[2] == [*text, BREAK]
    cut = raw_streams("text", [document], tokenizer, 2)[0].tolist()
    assert cut == [TITLE, *title[:2], TITLE_END, *title[2:], TITLE_END, *text, BREAK]
    untitled = raw_streams("text", [replace(document, title="")], tokenizer, 2)[0].tolist()
    assert untitled == [*text, BREAK]


def test_pseudo_queries_of_a_later_document_use_what_was_fitted(data: RetrievalData) -> None:
    retriever = untrained(data.documents[:40], views=list(MULTIVIEW), pseudo_queries=3)
    fitted = retriever._version.corpus.queries
    retriever.insert(data.documents[40:60])
    assert retriever._version.corpus.queries is fitted
    stream = retriever.indexes["query"].streams.row(45)
    assert (stream == BREAK).sum() == 3
    assert fitted(data.documents[45]) == fitted(data.documents[45])


def test_vocabulary_grows_behind_the_known_codes() -> None:
    vocabulary = Vocabulary.fit([np.array([FIRST + 9, FIRST + 2, FIRST + 9, BREAK])], 20)
    assert vocabulary.tokens.tolist() == [2, 9]
    grown = vocabulary.extended([np.array([FIRST + 1, FIRST + 9, FIRST + 15, BREAK])])
    assert grown.tokens.tolist() == [2, 9, 1, 15]
    assert grown.initial == vocabulary.initial == vocabulary.size == FIRST + 2
    assert vocabulary.extended([np.array([FIRST + 9])]) is vocabulary
    assert grown.encode([np.array([FIRST + 9, FIRST + 15, FIRST + 3, TITLE])]).codes.tolist() == [4, 6, BREAK, TITLE]
    assert grown.codes([9, 3, 1]).tolist() == [4, 5]


def test_marker_is_never_cut_off() -> None:
    inputs = MarkedInputs(load_static(), 8)
    words = "a much longer query than the network reads at once"
    plain = inputs.features([words], "text")["ids"][0].tolist()
    for view in MULTIVIEW:
        marker = load_static().encode([f"|| {view}"])[0]
        ids = inputs.features([words, "a"], view)["ids"].tolist()
        assert ids[0][-len(marker) :] == marker
        assert ids[0][: 8 - len(marker)] == plain[: 8 - len(marker)]
        assert [token for token in ids[1] if token][1:] == marker
