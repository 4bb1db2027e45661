"""Real text (docstrings of the libraries that are installed anyway) and real static word embeddings."""

from __future__ import annotations

import collections
import email
import hashlib
import inspect
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mobula.data.records import Document


class Words:
    """Mean of the wordllama vectors of a text's tokens."""

    def __init__(self, folder: Path) -> None:
        (self.table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
        path = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
        self.tokenizer = Tokenizer.from_file(str(path))
        self.hash = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.decode_batch([list(row) for row in tokens])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self.table[ids].astype(np.float32).mean(0) if ids else np.zeros(256) for ids in self.encode(texts)]
        vectors = np.stack(rows).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


@pytest.fixture(scope="session")
def words() -> Words:
    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package wordllama is not installed")
    return Words(Path(spec.submodule_search_locations[0]))


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    modules = (np, np.linalg, np.random, np.ma, np.fft, statistics, collections, inspect, email)
    texts = {}
    for module in modules:
        for name in dir(module):
            text = inspect.getdoc(getattr(module, name)) or ""
            if len(text) > 200 and text not in texts.values():
                texts[f"{module.__name__}.{name}"] = text
    return [Document(name, name.rsplit(".", 1)[-1].replace("_", " "), text) for name, text in sorted(texts.items())]


@pytest.fixture(scope="session")
def embeddings(words: Words, corpus: list[Document]) -> np.ndarray:
    return words.embed([d.text for d in corpus])


@pytest.fixture(scope="session")
def newcomers(words: Words) -> tuple[list[Document], np.ndarray]:
    """Documents of another library, which no fit has seen."""
    texts = {name: inspect.getdoc(getattr(hashlib, name)) or "" for name in dir(hashlib)}
    texts |= {name: inspect.getdoc(getattr(Path, name)) or "" for name in dir(Path)}
    documents = [Document(f"new.{n}", n.strip("_"), t) for n, t in sorted(texts.items()) if len(t) > 40]
    return documents, words.embed([d.text for d in documents])
