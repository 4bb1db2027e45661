from __future__ import annotations

import numpy as np
import pytest

from mobula.data.records import Document, Query
from mobula.models.text import StaticEmbedding
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.leak import DocidLeak, docid_leak, require_no_leak
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable


def text_table(family: str, corpus: list[Document], words: StaticEmbedding) -> DocidTable:
    space = fit_space(DocidConfig(family=family, levels=6), corpus, None, seed=0, tokenizer=words)
    return DocidTable.build(space, corpus)


def test_docid_not_in_input(corpus: list[Document], words: StaticEmbedding) -> None:
    """Titles as queries hold the title docid; bodies' openings hold the lead docid; other text holds neither."""
    titles = [Query(d.id, f"About {d.title.upper()}?", (d.id,)) for d in corpus]
    table = text_table("text.title", corpus, words)
    assert docid_leak(titles, table) == 1.0
    with pytest.raises(DocidLeak, match=r"100.0% of the queries contain the docid.*text.title"):
        require_no_leak(titles, table, 0.05)

    others = [Query(d.id, f"About {d.title}?", (corpus[i - 97].id,)) for i, d in enumerate(corpus)]
    assert require_no_leak(others, table, 0.05) < 0.05

    lead = text_table("text.lead", corpus, words)
    assert docid_leak(titles, lead) < 0.5
    assert docid_leak([Query(d.id, d.text, (d.id,)) for d in corpus], lead) > 0.95


def test_keywords_leak_in_any_order(words: StaticEmbedding) -> None:
    documents = [
        Document("a", "", "apple house stone"),
        Document("b", "", "river house"),
        Document("c", "", "stone river"),
    ]
    table = text_table("text.keywords", documents, words)
    queries = [
        Query("1", "a stone, a house, an apple", ("a",)),
        Query("2", "a stone and an apple", ("a",)),
        Query("3", "nothing", ("unknown",)),
    ]
    assert docid_leak(queries, table) == pytest.approx(1 / 3)


def test_codes_are_no_text(corpus: list[Document], embeddings: np.ndarray) -> None:
    space = fit_space(DocidConfig(levels=4, codes=16), corpus, embeddings, seed=0)
    table = DocidTable.build(space, corpus, embeddings)
    assert docid_leak([Query("q", "1 2 3 4", (corpus[0].id,))], table) == 0.0
