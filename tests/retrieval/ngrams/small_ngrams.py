"""Untrained language models over the n-grams of a few documents."""

from __future__ import annotations

import torch

from mobula.data.records import Document
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.language import build_network, network_shape
from mobula.retrieval.ngrams.retriever import Corpus, NgramRetriever

MODEL = ModelConfig(width=32, layers=1, query_len=16)


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
