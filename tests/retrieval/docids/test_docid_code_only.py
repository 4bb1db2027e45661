from __future__ import annotations

import numpy as np
import pytest

from mobula.data.records import Document
from mobula.errors import DataError
from mobula.models.text import StaticEmbedding
from mobula.retrieval.docids.code_only import CodeOnlyRetriever
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.search import SearchOptions, Unsupported


def body(document: Document) -> str:
    return document.text


def table_for(
    corpus: list[Document], embeddings: np.ndarray, family: str = "rq", collision: str = "bucket"
) -> DocidTable:
    config = DocidConfig(family=family, levels=4, codes=16)
    return DocidTable.build(fit_space(config, corpus, embeddings, seed=0), corpus, embeddings, collision)


@pytest.mark.parametrize("collision", ["bucket", "append"])
@pytest.mark.parametrize("family", ["rq", "pq", "opq"])
def test_scores_are_their_definitions(
    family: str, collision: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    table = table_for(corpus, embeddings, family, collision)
    queries = words.embed([d.title for d in corpus[:5]])
    own = table.space.encode_queries(queries)
    codes = table.codes[:, :4]
    hamming = CodeOnlyRetriever("hamming", table, words, body).scores(queries)
    np.testing.assert_array_equal(hamming, -(own[:, None] != codes).sum(2))
    adc = CodeOnlyRetriever("adc", table, words, body).scores(queries)
    difference = table.space.centred(queries)[:, None] - table.space.reconstruct(codes)
    np.testing.assert_allclose(adc, -(difference**2).sum(2), atol=1e-5)
    assert adc.dtype == hamming.dtype == np.float32


@pytest.mark.parametrize("name", ["hamming", "adc"])
def test_documents_of_equal_code_tie_exactly_in_corpus_order(
    name: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    twins = [Document(f"{d.id}.twin", d.title, d.text) for d in corpus[:50]]
    table = table_for(corpus + twins, np.concatenate([embeddings, embeddings[:50]]))
    retriever = CodeOnlyRetriever(name, table, words, body)
    scores = retriever.scores(words.embed([d.title for d in corpus[:20]]))
    np.testing.assert_array_equal(scores[:, :50], scores[:, len(corpus) :])
    order = {d: i for i, d in enumerate(table.doc_ids)}
    (result,) = retriever.search([corpus[0].title], [SearchOptions(k=400)])
    keys = [(-hit.score, order[hit.doc_id]) for hit in result.hits]
    assert keys == sorted(keys)


@pytest.mark.parametrize("name", ["hamming", "adc"])
def test_full_lists_of_live_documents_alone_or_in_a_batch(
    name: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    table = table_for(corpus[:60], embeddings[:60]).delete([d.id for d in corpus[:20]])
    retriever = CodeOnlyRetriever(name, table, words, body)
    queries = [d.title for d in corpus[:7]]
    options = [SearchOptions(k=k) for k in (1, 3, 10, 40, 41, 100, 5)]
    together = retriever.search(queries, options)
    assert [len(r.hits) for r in together] == [1, 3, 10, 40, 40, 40, 5]
    for query, option, result in zip(queries, options, together, strict=True):
        ids = {hit.doc_id for hit in result.hits}
        assert len(ids) == len(result.hits)
        assert ids <= set(table.rows)
        assert retriever.search([query], [option])[0].hits == result.hits


def test_lookup_retrieves_and_adc_beats_hamming(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    """Halves of documents find their documents far above chance; the vectors carry more than the codes."""
    table = table_for(corpus, embeddings)
    halves = words.embed([d.text[: len(d.text) // 2] for d in corpus])
    ranks = {}
    for name in ("hamming", "adc"):
        scores = CodeOnlyRetriever(name, table, words, body).scores(halves)
        ranks[name] = (scores >= scores.diagonal()[:, None]).sum(1)  # pessimistic: ties count against
    assert np.median(ranks["adc"]) < np.median(ranks["hamming"]) < len(corpus) / 10


@pytest.mark.parametrize("name", ["hamming", "adc"])
def test_inserted_documents_are_found(
    name: str,
    corpus: list[Document],
    embeddings: np.ndarray,
    newcomers: tuple[list[Document], np.ndarray],
    words: StaticEmbedding,
) -> None:
    retriever = CodeOnlyRetriever(name, table_for(corpus, embeddings), words, body)
    assert retriever.insert(newcomers[0]) == 1
    texts = [d.text for d in newcomers[0]]
    results = retriever.search(texts, [SearchOptions(k=20)] * len(texts))
    found = [d.id in {h.doc_id for h in r.hits} for d, r in zip(newcomers[0], results, strict=True)]
    assert np.mean(found) > 0.9
    gone = [d.id for d in newcomers[0][::2]]
    assert retriever.remove(gone) == 2
    results = retriever.search(texts, [SearchOptions(k=20)] * len(texts))
    assert not {h.doc_id for r in results for h in r.hits} & set(gone)
    assert retriever.insert(newcomers[0][::2]) == 3
    with pytest.raises(DataError, match="is not in the corpus"):
        retriever.remove([corpus[0].id, "nobody"])
    assert corpus[0].id in retriever.table.rows


def test_families_without_a_quantiser_have_no_code_only_retrieval(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    with pytest.raises(Unsupported, match="has no quantiser"):
        CodeOnlyRetriever("adc", table_for(corpus, embeddings, "random"), words, body)
    with pytest.raises(Unsupported, match="unknown code-only ranking 'cosine'"):
        CodeOnlyRetriever("cosine", table_for(corpus, embeddings), words, body)
