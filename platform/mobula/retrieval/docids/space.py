"""The code space: everything fitted that turns a document into its code. It never changes once fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mobula.data.records import Document
from mobula.errors import ConfigError
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES, Family, Fitted, Fitting
from mobula.retrieval.docids.text import DocidTokenizer


@dataclass(frozen=True, eq=False)
class DocidSpace(Fitted):
    """A fitted family of docids, and what its family makes of documents, queries and codes."""

    @property
    def kind(self) -> Family:
        """The family."""
        return FAMILIES[self.family]

    @property
    def eos(self) -> int | None:
        """The end token that pads codes of variable length; None where codes have fixed length."""
        return self.kind.eos

    @cached_property
    def hash(self) -> str:
        """SHA-256 over family, sizes, codebooks, and the hashes of tokenizer and encoder."""
        digest = hashlib.sha256(json.dumps([self.family, self.sizes.tolist(), self.meta], sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def encode(
        self, documents: Sequence[Document], embeddings: np.ndarray | None, taken: np.ndarray | None = None
    ) -> np.ndarray:
        """Codes i32[N, L] of documents, ``embeddings`` f32[N, D] being those of the fitted encoder.

        Neither order nor company changes a document's code, except where codes are handed out: the random
        rows and the leaf indices of ``hkmeans`` avoid the rows in ``taken`` i32[M, L]. In text families
        tokens that the fit has not seen have codes behind the others: see :meth:`.Family.insert`.

        Raises:
            Unsupported: for ``atomic`` documents that were not there at the fit.
        """
        used = set() if taken is None else {code.tobytes() for code in np.ascontiguousarray(taken, np.int32)}
        return self.kind.encode(self, documents, embeddings, used)

    def encode_queries(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[B, L] of queries, put through the same quantiser (``hkmeans``: the path without leaf index).

        Raises:
            Unsupported: for a family without a quantiser.
        """
        return self.kind.encode_queries(self, embeddings)

    def encode_after(self, prefix: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[N, L] that begin with ``prefix`` i32[N, l] and go on as the quantiser would from there.

        Raises:
            Unsupported: for a family that is not a sum of codewords.
        """
        return self.kind.encode_after(self, prefix, embeddings)

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """The vectors f32[N, D] that codes i32[N, L] stand for, in the centred space of :meth:`centred`.

        Raises:
            Unsupported: for a family without a quantiser.
        """
        return self.kind.reconstruct(self, codes)

    def codewords(self) -> np.ndarray | None:
        """Vectors f32[L, K, D] whose sum over a code's levels is its reconstruction; None where there are none."""
        return self.kind.codewords(self)


def fit_space(
    config: DocidConfig,
    documents: Sequence[Document],
    embeddings: np.ndarray | None,
    *,
    seed: int,
    encoder_hash: str = "",
    tokenizer: DocidTokenizer | None = None,
    windows: np.ndarray | None = None,
) -> DocidSpace:
    """Fit a code space on the training documents (and, with ``fit_on: windows``, on windows f32[M, D] of them).

    Raises:
        ConfigError: if the documents cannot carry such a space (fewer than K, no room for unique codes, ...).
        CodebookCollapsed: if a level's entropy over the documents is below ``min_entropy`` * log2 K_l while
            there are at least 8 documents per code.
    """
    if not documents:
        raise ConfigError(["no documents to fit docids on"], "docid")
    family = FAMILIES[config.family]
    on = Fitting(documents, embeddings, seed, encoder_hash, tokenizer, windows)
    return DocidSpace(config.family, *family.fit(config, on), tokenizer if family.is_text else None)
