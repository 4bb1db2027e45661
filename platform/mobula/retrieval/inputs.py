"""How text becomes what the docid network reads, for training queries on disk and for live queries alike.

Kinds: token ids (``small`` backbone); the states of a sentence encoder (``encoder`` backbone), computed once per text
and kept as memory-mapped float16 arrays so that training never runs the encoder again; the token ids of a sentence
encoder that is trained along; and the prompts of pretrained language models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mobula.errors import MobulaError
from mobula.models.encoders import TextEncoder, TransformerEncoder
from mobula.models.text import StaticEmbedding
from mobula.portable import Portable

log = logging.getLogger(__name__)
PROGRESS_S = 10.0
PROMPT = ("query: ", "\ndocid:")  # before and after the query of a language model


class EmptyQuery(MobulaError):
    """A query of which no token is left."""


class QueryInputs(Protocol):
    """Turns texts into the network's ``query`` dictionary."""

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

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As :class:`QueryInputs`."""
        _require_words(texts)
        states, mask, pooled = self.encoder.states(list(texts), max_tokens=self.query_len)
        padded = np.zeros((len(texts), self.query_len, self.encoder.dim), dtype=np.float16)
        present = np.zeros((len(texts), self.query_len), dtype=bool)
        padded[:, : states.shape[1]], present[:, : states.shape[1]] = states, mask
        return {
            "states": torch.from_numpy(padded),
            "mask": torch.from_numpy(present),
            "vector": torch.from_numpy(np.ascontiguousarray(pooled - self.mean, dtype=np.float32)),
        }


@dataclass
class EncoderInputs:
    """Token ids i64[B, n] and mask bool[B, n] for a sentence encoder that is trained with the model."""

    encoder: TransformerEncoder
    query_len: int

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As :class:`QueryInputs`."""
        _require_words(texts)
        return _padded(self.encoder.tokens(texts, self.query_len), self.query_len)


class PromptInputs:
    """The prompts of a language model as token ids i64[B, n] and mask bool[B, n]; queries are cut on the right.

    ``continued``: the docid follows the prompt in one sequence, so padding goes to the left and the tokenizer's
    closing token is left out; otherwise the prompt is a sequence of its own.
    """

    def __init__(self, tokenizer: Any, query_len: int, *, continued: bool) -> None:
        self.tokenizer, self.query_len, self.continued = tokenizer, query_len, continued
        opening, closing = _special_tokens(tokenizer)
        before, after = (self._ids([part])[0] for part in PROMPT)
        self._before, self._after = opening + before, after + ([] if continued else closing)
        self._length = len(self._before) + query_len + len(self._after)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As :class:`QueryInputs`."""
        queries = self._ids(texts)
        empty = [text for text, ids in zip(texts, queries, strict=True) if not ids]
        if empty:
            raise EmptyQuery(f"no token is left of the query {empty[0][:80]!r}")
        prompts = [self._before + ids[: self.query_len] + self._after for ids in queries]
        return _padded(prompts, self._length, left=self.continued)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    opening = len(list(takewhile(bool, special)))
    closing = len(list(takewhile(bool, reversed(special))))
    return ids[:opening], ids[len(ids) - closing :]


def _padded(ids: Sequence[Sequence[int]], length: int, *, left: bool = False) -> dict[str, Tensor]:
    """Token ids i64[B, length], 0 where the mask bool[B, length] says that there is none."""
    rows, mask = np.zeros((len(ids), length), dtype=np.int64), np.zeros((len(ids), length), dtype=bool)
    for i, row in enumerate(ids):
        span = slice(length - len(row), length) if left else slice(0, len(row))
        rows[i, span], mask[i, span] = row, True
    return {"ids": torch.from_numpy(rows), "mask": torch.from_numpy(mask)}


def _require_words(texts: Sequence[str]) -> None:
    empty = [text for text in texts if not text.strip()]
    if empty:
        raise EmptyQuery(f"no token is left of the query {empty[0][:80]!r}")


@dataclass(frozen=True)
class StoredFeatures(Portable):
    """Features of many texts in a folder of .npy files, memory-mapped when read."""

    directory: Path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, sorted."""
        paths = sorted(self.directory.glob("*.npy"))
        return {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in paths}

    @classmethod
    def write(cls, directory: Path, inputs: QueryInputs, texts: Sequence[str], chunk: int = 1024) -> StoredFeatures:
        """Compute and store the features of ``texts`` in order."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        logged = time.monotonic()
        for start in range(0, len(texts), chunk):
            if time.monotonic() - logged > PROGRESS_S:
                logged = time.monotonic()
                log.info("features of %d of %d texts", start, len(texts))
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
        return len(next(iter(self.arrays.values())))

    def rows(self, index: np.ndarray) -> dict[str, Tensor]:
        """The features at ``index`` i64[B]."""
        return {name: torch.from_numpy(np.array(array[index])) for name, array in self.arrays.items()}

    def all(self) -> dict[str, Tensor]:
        """Every feature (small sets)."""
        return self.rows(np.arange(len(self)))
