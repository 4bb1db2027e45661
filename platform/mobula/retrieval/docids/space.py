"""The code space: everything fitted that turns a document into its code. It never changes once fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mobula.data.records import Document
from mobula.errors import ConfigError, MobulaError, TrainingError
from mobula.retrieval.docids import controls, hierarchy, quantised, text
from mobula.retrieval.docids.config import EMBEDDED, QUANTISED, TEXT, DocidConfig
from mobula.retrieval.search import Unsupported

GUARDED_DOCUMENTS_PER_CODE = 8  # below this a level's entropy says little about its codebook


class CodebookCollapsed(TrainingError):
    """A level uses so few of its codes that it tells documents apart poorly."""


class DocidTokenizer(Protocol):
    """What text families ask of a tokenizer."""

    hash: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


@dataclass(frozen=True, eq=False)
class DocidSpace:
    """A fitted family of docids.

    ``sizes`` i32[L] holds K_l; ``arrays`` the codebooks (and the corpus mean), vocabulary or tree; ``meta``
    the hashes of encoder and tokenizer and what else the family needs, in JSON types. The tokenizer itself
    is handed in wherever text is encoded and is not stored.
    """

    family: str
    sizes: np.ndarray
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    tokenizer: DocidTokenizer | None = field(default=None, repr=False)

    @property
    def levels(self) -> int:
        """Code length L."""
        return len(self.sizes)

    @property
    def eos(self) -> int | None:
        """The end token that pads codes of variable length; None where codes have fixed length."""
        return 0 if self.family == "hkmeans" or self.family in TEXT else None

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
        tokens that the fit has not seen have codes behind the others: see :meth:`encode_text`.

        Raises:
            Unsupported: for ``atomic`` documents that were not there at the fit.
        """
        if self.family in TEXT:
            return self.encode_text(documents, self.arrays["vocabulary"])[0]
        if self.family == "random":
            return controls.encode_random(self.sizes, self.meta["seed"], documents, taken)
        if self.family == "atomic":
            return controls.encode_atomic(self.meta["ids"], documents)
        vectors = self.centred(embeddings)
        if len(vectors) != len(documents):
            raise MobulaError(f"{len(documents)} documents but {len(vectors)} embeddings; give one each")
        if self.family == "hkmeans":
            return hierarchy.encode(self.arrays, self.levels, int(self.sizes[0]), documents, vectors, taken)
        return quantised.encode(self.arrays, vectors)

    def encode_text(self, documents: Sequence[Document], vocabulary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes i32[N, L] of documents, and the vocabulary i64[K'] with the tokens that they bring behind the others.

        ``vocabulary`` i64[K] is that of the fit with what came since.
        """
        rows = text.docid_tokens(self.family, self.levels, self.arrays, documents, self.require_tokenizer())
        grown = np.append(vocabulary, text.unseen(vocabulary, rows))
        return text.encode(grown, self.levels, rows), grown

    def encode_queries(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[B, L] of queries, put through the same quantiser (``hkmeans``: the path without leaf index).

        Raises:
            Unsupported: for a family without a quantiser.
        """
        self._require_quantiser()
        vectors = self.centred(embeddings)
        if self.family == "hkmeans":
            return hierarchy.paths(self.arrays, self.levels, vectors)[0]
        return quantised.encode(self.arrays, vectors)

    def encode_after(self, prefix: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[N, L] that begin with ``prefix`` i32[N, l] and go on as the quantiser would from there.

        Raises:
            Unsupported: for a family that is not a sum of codewords.
        """
        if self.family not in QUANTISED:
            raise Unsupported(f"docid family {self.family} has no codewords; use one of {', '.join(QUANTISED)}")
        return quantised.encode(self.arrays, self.centred(embeddings), prefix)

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """The vectors f32[N, D] that codes i32[N, L] stand for, in the centred space of :meth:`centred`.

        Raises:
            Unsupported: for a family without a quantiser.
        """
        self._require_quantiser()
        if self.family == "hkmeans":
            return hierarchy.reconstruct(self.arrays, codes)
        return quantised.reconstruct(self.arrays, codes)

    def codewords(self) -> np.ndarray | None:
        """Vectors f32[L, K, D] whose sum over a code's levels is its reconstruction; None where there are none."""
        return quantised.codewords(self.arrays) if self.family in QUANTISED else None

    def centred(self, embeddings: np.ndarray | None) -> np.ndarray:
        """Embeddings at unit norm minus the mean of the documents of the fit, f64[N, D].

        Double precision, so that the nearest codebook entry does not depend on how many documents share the
        matrix product.
        """
        if embeddings is None:
            raise MobulaError(f"docid family {self.family} needs the documents' embeddings")
        mean = self.arrays["mean"]
        if embeddings.ndim != 2 or embeddings.shape[1] != len(mean):
            raise MobulaError(f"embeddings of shape {embeddings.shape}; expected [N, {len(mean)}] as at the fit")
        return unit(embeddings) - mean

    def _require_quantiser(self) -> None:
        if self.family not in EMBEDDED:
            raise Unsupported(f"docid family {self.family} has no quantiser; use one of {', '.join(EMBEDDED)}")

    def require_tokenizer(self) -> DocidTokenizer:
        if self.tokenizer is None:
            raise MobulaError(f"docid family {self.family} needs its tokenizer to encode text; pass tokenizer=")
        return self.tokenizer


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
    if config.family in TEXT:
        if tokenizer is None:
            raise MobulaError(f"docid family {config.family} needs a tokenizer; pass tokenizer=")
        sizes, arrays = text.fit(config.family, config.levels, documents, tokenizer)
        return DocidSpace(config.family, sizes, arrays, {"tokenizer_hash": tokenizer.hash}, tokenizer)
    if config.family == "random":
        sizes = controls.random_sizes(config.levels, config.codes, len(documents))
        return DocidSpace("random", sizes, {}, {"seed": seed})
    if config.family == "atomic":
        ids = [d.id for d in documents]
        return DocidSpace("atomic", np.array([len(ids)], np.int32), {}, {"ids": ids})
    return _fit_embedded(config, embeddings, windows, seed, encoder_hash)


def _fit_embedded(
    config: DocidConfig, embeddings: np.ndarray | None, windows: np.ndarray | None, seed: int, encoder_hash: str
) -> DocidSpace:
    if embeddings is None:
        raise MobulaError(f"docid family {config.family} needs the documents' embeddings")
    if (config.fit_on == "windows") != (windows is not None):
        raise MobulaError(f"docid.fit_on={config.fit_on}: window embeddings are wanted for `windows`, and only then")
    mean = unit(embeddings).mean(0).astype(np.float32)
    points = unit(embeddings if windows is None else np.concatenate([embeddings, windows])) - mean
    if config.family == "hkmeans":
        sizes, arrays = hierarchy.fit(config, points, seed)
    else:
        sizes, arrays = quantised.fit(config, points, seed)
    space = DocidSpace(config.family, sizes, {"mean": mean, **arrays}, {"encoder_hash": encoder_hash})
    if config.family in QUANTISED:
        check_entropy(quantised.encode(space.arrays, points[: len(embeddings)]), sizes, config.min_entropy)
    return space


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows at unit norm, f64[N, D]; a zero row (a text without tokens) stays zero."""
    vectors = np.asarray(embeddings, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def entropies(codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Entropy in bits of each level of codes i32[N, L], f64[L]."""
    bits = np.zeros(len(sizes))
    for level, size in enumerate(sizes):
        share = np.bincount(codes[:, level], minlength=size) / max(1, len(codes))
        share = share[share > 0]
        bits[level] = -(share * np.log2(share)).sum()
    return bits


def check_entropy(codes: np.ndarray, sizes: np.ndarray, least: float) -> None:
    """Refuse a collapsed level.

    Raises:
        CodebookCollapsed: naming the level, its entropy and what would be enough.
    """
    for level, (bits, size) in enumerate(zip(entropies(codes, sizes), sizes, strict=True)):
        wanted = least * np.log2(size)
        if len(codes) >= GUARDED_DOCUMENTS_PER_CODE * size and bits < wanted:
            raise CodebookCollapsed(
                f"docid level {level} has {bits:.2f} bits, expected at least {wanted:.2f} of {np.log2(size):.2f}; "
                "use docid.rq.assign=balanced, fewer levels, or lower docid.min_entropy"
            )
