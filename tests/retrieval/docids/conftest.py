"""Real text (docstrings of the libraries that are installed anyway) and real static word embeddings."""

from __future__ import annotations

import collections
import email
import hashlib
import inspect
import statistics
from pathlib import Path

import numpy as np
import pytest

from mobula.data.records import Document
from mobula.errors import ModelError
from mobula.models.text import StaticEmbedding, load_static

LENGTH = 400  # characters of a text; enough to tell documents apart, and quick to tokenise


@pytest.fixture(scope="session")
def words() -> StaticEmbedding:
    try:
        return load_static()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    modules = (np, np.linalg, np.random, np.ma, np.fft, statistics, collections, inspect, email)
    texts = {}
    for module in modules:
        for name in dir(module):
            text = (inspect.getdoc(getattr(module, name)) or "")[:LENGTH]
            if len(text) > 200 and text not in texts.values():
                texts[f"{module.__name__}.{name}"] = text
    return [Document(name, name.rsplit(".", 1)[-1].replace("_", " "), text) for name, text in sorted(texts.items())]


@pytest.fixture(scope="session")
def embeddings(words: StaticEmbedding, corpus: list[Document]) -> np.ndarray:
    return words.embed([d.text for d in corpus])


@pytest.fixture(scope="session")
def newcomers(words: StaticEmbedding) -> tuple[list[Document], np.ndarray]:
    """Documents of another library, which no fit has seen."""
    texts = {name: inspect.getdoc(getattr(hashlib, name)) or "" for name in dir(hashlib)}
    texts |= {name: inspect.getdoc(getattr(Path, name)) or "" for name in dir(Path)}
    documents = [Document(f"new.{n}", n.strip("_"), t[:LENGTH]) for n, t in sorted(texts.items()) if len(t) > 40]
    return documents, words.embed([d.text for d in documents])
