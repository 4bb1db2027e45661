"""How text becomes what the docid network reads, for training views on disk and for live queries alike.

Two kinds: token ids (``small`` backbone), and the states of a sentence encoder (``encoder`` backbone), computed
once per text and kept as memory-mapped float16 arrays so that training never runs the encoder again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mobula.errors import MobulaError
from mobula.models.encoders import TextEncoder
from mobula.models.text import StaticEmbedding


class EmptyQuery(MobulaError):
    """A query of which no token is left."""


class QueryInputs(Protocol):
    """Turns texts into the network's ``query`` dictionary."""

    input_dim: int
    query_len: int

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Arrays for B texts, the first axis of each being B.

        Raises:
            EmptyQuery: naming the text that has no token.
        """


@dataclass
class TokenInputs:
    """Token ids i64[B, n] of a static embedding's tokenizer, 0 padded, cut on the right at ``query_len``."""

    embedding: StaticEmbedding
    query_len: int

    @property
    def input_dim(self) -> int:
        """Width of the embedding table."""
        return self.embedding.table.shape[1]

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As :class:`QueryInputs`."""
        rows = np.zeros((len(texts), self.query_len), dtype=np.int64)
        for row, text, ids in zip(rows, texts, self.embedding.encode(list(texts)), strict=True):
            if not ids:
                raise EmptyQuery(f"no token is left of the query {text[:80]!r}")
            row[: len(ids)] = ids[: self.query_len]
        return {"ids": torch.from_numpy(rows)}


@dataclass
class StateInputs:
    """States f16[B, n, D] of a sentence encoder, their mask, and the centred sentence vector f32[B, D].

    ``mean`` f32[D] is the corpus mean that the docid space subtracts; the codeword prior compares like with like.
    """

    encoder: TextEncoder
    query_len: int
    mean: np.ndarray

    @property
    def input_dim(self) -> int:
        """Width of the encoder's states."""
        return self.encoder.dim

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As :class:`QueryInputs`."""
        empty = [text for text in texts if not text.strip()]
        if empty:
            raise EmptyQuery(f"no token is left of the query {empty[0][:80]!r}")
        states, mask, pooled = self.encoder.states(list(texts), max_tokens=self.query_len)
        padded = np.zeros((len(texts), self.query_len, self.input_dim), dtype=np.float16)
        present = np.zeros((len(texts), self.query_len), dtype=bool)
        padded[:, : states.shape[1]], present[:, : states.shape[1]] = states, mask
        return {
            "states": torch.from_numpy(padded),
            "mask": torch.from_numpy(present),
            "vector": torch.from_numpy(np.ascontiguousarray(pooled - self.mean, dtype=np.float32)),
        }


class StoredFeatures:
    """Features of many texts in a folder of .npy files, memory-mapped when read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._arrays: dict[str, np.ndarray] = {}

    @classmethod
    def write(cls, directory: Path, inputs: QueryInputs, texts: Sequence[str], chunk: int = 1024) -> StoredFeatures:
        """Compute and store the features of ``texts`` in order."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for start in range(0, len(texts), chunk):
            for name, values in inputs.features(texts[start : start + chunk]).items():
                if name not in arrays:
                    shape = (len(texts), *values.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(
                        directory / f"{name}.npy", mode="w+", dtype=values.numpy().dtype, shape=shape
                    )
                arrays[name][start : start + len(values)] = values.numpy()
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        return cls(directory)

    def __len__(self) -> int:
        return len(next(iter(self._open().values())))

    def rows(self, index: np.ndarray) -> dict[str, Tensor]:
        """The features at ``index`` i64[B]."""
        return {name: torch.from_numpy(np.array(array[index])) for name, array in self._open().items()}

    def all(self) -> dict[str, Tensor]:
        """Every feature (small sets)."""
        return self.rows(np.arange(len(self)))

    def _open(self) -> dict[str, np.ndarray]:
        if not self._arrays:
            paths = sorted(self.directory.glob("*.npy"))
            self._arrays = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in paths}
        return self._arrays

    def __getstate__(self) -> dict[str, Path]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.directory = state["directory"]
        self._arrays = {}
