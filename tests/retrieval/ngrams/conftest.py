"""Small corpora of real documents with an untrained language model over their n-grams."""

from __future__ import annotations

import pytest
import torch

from mobula.data import DataConfig, RetrievalData, load_retrieval
from mobula.data.records import Document
from mobula.errors import DataError, ModelError
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.language import build_network, network_shape
from mobula.retrieval.ngrams.retriever import Corpus, NgramRetriever

MODEL = ModelConfig(width=32, layers=1, query_len=16)


@pytest.fixture(scope="session")
def functions() -> RetrievalData:
    try:
        return load_retrieval(DataConfig(name="functions", max_documents=150), quiet=True)
    except (DataError, ModelError) as error:
        pytest.skip(str(error))


def untrained(documents: list[Document], *, embed: str = "wordllama", **options) -> NgramRetriever:
    """A retriever whose language model has random weights, large enough to have preferences."""
    config = NgramConfig(max_len=4, beam=5, **options)
    corpus = Corpus.fit(documents, config, seed=0)
    model = ModelConfig(width=MODEL.width, layers=MODEL.layers, query_len=MODEL.query_len, embed=embed)
    shape = network_shape(model, corpus.vocabulary, config.max_len, corpus.tokenizer.dim)
    torch.manual_seed(0)
    network = build_network(shape, corpus.vocabulary, corpus.tokenizer)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return NgramRetriever("ngram", network.eval(), corpus)
