"""The table of docid families: all that differs by family, in one object each.

A family is fitted on the documents of the training corpus (``fit``), gives documents their codes (``encode``), takes
documents that arrive later (``insert``) and, where codes stand for vectors, says for which (``codewords``,
``reconstruct``).
Its ``role`` decides which claims it takes part in.

Shapes: N documents, L levels, K_l codes of level l, D size of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from mobula.data.records import Document
from mobula.errors import MobulaError
from mobula.models.text import load_static
from mobula.retrieval.docids import controls, hierarchy, quantised, text
from mobula.retrieval.docids.settings import CodeConfig
from mobula.retrieval.docids.text import DocidTokenizer
from mobula.retrieval.search import Unsupported

TITLE_LEAK = 0.5  # share of queries that may hold their docid by chance; queries that are titles hold it always
Role = Literal["quantised", "tree", "text", "control"]
Parts = tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]  # sizes i32[L], arrays, meta of a fitted space


@dataclass(frozen=True)
class Fitting:
    """What families are fitted on: documents, and what some families need besides.

    ``embeddings`` f32[N, D] are those of the documents, ``windows`` f32[M, D] those of parts of them.
    """

    documents: Sequence[Document]
    embeddings: np.ndarray | None
    seed: int
    encoder_hash: str = ""
    tokenizer: DocidTokenizer | None = None
    windows: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted family of docids.

    ``sizes`` i32[L] holds K_l; ``arrays`` the codebooks (and the corpus mean), vocabulary or tree; ``meta`` the hashes
    of encoder and tokenizer and what else the family needs, in JSON types. The tokenizer itself is handed in wherever
    text is encoded and is not stored.
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

    def require_tokenizer(self) -> DocidTokenizer:
        """The tokenizer of a text family."""
        if self.tokenizer is None:
            raise MobulaError(f"docid family {self.family} needs its tokenizer to encode text; pass tokenizer=")
        return self.tokenizer


@dataclass(frozen=True)
class Family(ABC):
    """One way of giving documents their codes. Attributes are what holds for most families."""

    name: str
    titles: bool = False  # whether the docid is a title, which queries that are titles hold
    orthogonal: bool = False  # whether codewords of different levels are, so that distances are sums over levels

    role: ClassVar[Role]
    eos: ClassVar[int | None] = None  # the end token that pads codes of variable length
    fewest_levels: ClassVar[int] = 1
    why_fewest: ClassVar[str] = ""
    growable: ClassVar[bool] = True  # whether documents may arrive without training
    reachable: ClassVar[bool] = True  # whether a model can know to produce the codes of documents that arrive
    allots: ClassVar[bool] = False  # whether equal documents get the indices that are free, as long as there are any

    @property
    def is_text(self) -> bool:
        """Whether codes are tokens of the document."""
        return self.role == "text"

    @property
    def is_numeric(self) -> bool:
        """Whether codes come from the document's embedding."""
        return self.role in ("quantised", "tree")

    @property
    def is_quantised(self) -> bool:
        """Whether a code is a sum of codewords, by which documents can be ranked without a model (Hamming, ADC)."""
        return self.role == "quantised"

    @property
    def is_control(self) -> bool:
        """Whether codes say nothing about the document."""
        return self.role == "control"

    @property
    def leak_limit(self) -> float:
        """Share of queries that may contain the docid of a gold document."""
        return TITLE_LEAK if self.titles else 1.0

    def length(self, levels: int) -> int:
        """Code length L before any level is appended."""
        return levels

    def collision(self, wanted: str) -> str:
        """What becomes of documents of equal code; those of controls always differ, so nothing is appended."""
        return "bucket" if self.is_control else wanted

    def tokenizer(self) -> DocidTokenizer | None:
        """The tokenizer that text is encoded with."""
        return load_static("wordllama") if self.is_text else None

    @abstractmethod
    def fit(self, config: CodeConfig, on: Fitting) -> Parts:
        """Sizes, arrays and meta of the space.

        Raises:
            ConfigError: if the documents cannot carry such a space (fewer than K, no room for unique codes, ...).
            CodebookCollapsed: if a level's entropy over the documents is below ``min_entropy`` * log2 K_l while
                there are at least 8 documents per code.
        """

    @abstractmethod
    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """Codes i32[N, L]; codes that are handed out avoid those in ``taken``, which holds the bytes of i32[L]."""

    def insert(
        self,
        space: Fitted,
        documents: Sequence[Document],
        embeddings: np.ndarray | None,
        taken: Container[bytes],
        tokens: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes i32[N, L], and the table's ``tokens`` i64[m] with those that these documents bring behind them."""
        return self.encode(space, documents, embeddings, taken), tokens

    def empty(self, codes: np.ndarray) -> int:
        """How many of the codes i32[N, L] are those of a text without a token."""
        return 0

    def encode_queries(self, space: Fitted, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[B, L] of queries, put through the same quantiser."""
        raise Unsupported(f"docid family {self.name} has no quantiser; use one of {', '.join(NUMERIC)}")

    def encode_after(self, space: Fitted, prefix: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Codes i32[N, L] that begin with ``prefix`` i32[N, l] and go on as the quantiser would from there."""
        raise Unsupported(f"docid family {self.name} has no codewords; use one of {', '.join(QUANTISED)}")

    def reconstruct(self, space: Fitted, codes: np.ndarray) -> np.ndarray:
        """The centred vectors f32[N, D] that codes i32[N, L] stand for."""
        raise Unsupported(f"docid family {self.name} has no quantiser; use one of {', '.join(NUMERIC)}")

    def codewords(self, space: Fitted) -> np.ndarray | None:
        """Vectors f32[L, K, D] whose sum over a code's levels is its reconstruction; None where there are none."""
        return None


class Numeric(Family):
    """Codes from the document's embedding."""

    def fit(self, config: CodeConfig, on: Fitting) -> Parts:
        """As :meth:`Family.fit`, over unit vectors without the mean of the documents."""
        if on.embeddings is None:
            raise MobulaError(f"docid family {self.name} needs the documents' embeddings")
        if (config.fit_on == "windows") != (on.windows is not None):
            raise MobulaError(
                f"docid.fit_on={config.fit_on}: window embeddings are wanted for `windows`, and only then"
            )
        mean = unit(on.embeddings).mean(0).astype(np.float32)
        every = on.embeddings if on.windows is None else np.concatenate([on.embeddings, on.windows])
        points = unit(every) - mean
        sizes, arrays = self.fit_points(config, points, len(on.embeddings), on.seed)
        return sizes, {"mean": mean, **arrays}, {"encoder_hash": on.encoder_hash}

    @abstractmethod
    def fit_points(
        self, config: CodeConfig, points: np.ndarray, documents: int, seed: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sizes and arrays fitted on points f64[M, D], of which the first ``documents`` are whole documents."""


@dataclass(frozen=True)
class Quantised(Numeric):
    """Residual and product quantisation (:mod:`.quantised`)."""

    fit_codebooks: Callable[[CodeConfig, np.ndarray, int], dict[str, np.ndarray]] = quantised.fit_rq
    role: ClassVar[Role] = "quantised"

    def fit_points(
        self, config: CodeConfig, points: np.ndarray, documents: int, seed: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As :meth:`Numeric.fit_points`."""
        sizes = quantised.sizes(config, points)
        arrays = self.fit_codebooks(config, points, seed)
        quantised.check_entropy(quantised.encode(arrays, points[:documents]), sizes, config.min_entropy)
        return sizes, arrays

    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """The nearest codebook entries."""
        return quantised.encode(space.arrays, _of_each(space, documents, embeddings))

    def encode_queries(self, space: Fitted, embeddings: np.ndarray) -> np.ndarray:
        """As documents."""
        return quantised.encode(space.arrays, space.centred(embeddings))

    def encode_after(self, space: Fitted, prefix: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """As :meth:`Family.encode_after`."""
        return quantised.encode(space.arrays, space.centred(embeddings), prefix)

    def reconstruct(self, space: Fitted, codes: np.ndarray) -> np.ndarray:
        """The sum of codewords."""
        return quantised.reconstruct(space.arrays, codes)

    def codewords(self, space: Fitted) -> np.ndarray | None:
        """As :meth:`Family.codewords`."""
        return quantised.codewords(space.arrays)


class Tree(Numeric):
    """Paths in a tree of k-means clusters (:mod:`.hierarchy`)."""

    role: ClassVar[Role] = "tree"
    eos: ClassVar[int | None] = hierarchy.END
    allots: ClassVar[bool] = True
    fewest_levels: ClassVar[int] = 3
    why_fewest: ClassVar[str] = "a branch, a leaf index, the end token"

    def fit_points(
        self, config: CodeConfig, points: np.ndarray, documents: int, seed: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As :meth:`Numeric.fit_points`."""
        return hierarchy.fit(config, points, seed)

    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """The path to a leaf, and a free index in it."""
        vectors = _of_each(space, documents, embeddings)
        return hierarchy.encode(space.arrays, space.levels, int(space.sizes[0]), documents, vectors, taken)

    def encode_queries(self, space: Fitted, embeddings: np.ndarray) -> np.ndarray:
        """The path to a leaf, without an index."""
        return hierarchy.paths(space.arrays, space.levels, space.centred(embeddings))[0]

    def reconstruct(self, space: Fitted, codes: np.ndarray) -> np.ndarray:
        """The centroids of the leaves."""
        return hierarchy.reconstruct(space.arrays, codes)


@dataclass(frozen=True)
class Text(Family):
    """Tokens of the document itself (:mod:`.text`): the first of ``source``, or its L best by tf·idf (``keywords``)."""

    source: Callable[[Document], str] = text.title_or_lead
    keywords: bool = False
    role: ClassVar[Role] = "text"
    eos: ClassVar[int | None] = text.EOS

    def fit(self, config: CodeConfig, on: Fitting) -> Parts:
        """The vocabulary of the docids."""
        if on.tokenizer is None:
            raise MobulaError(f"docid family {self.name} needs a tokenizer; pass tokenizer=")
        rows = self._tokens(on.documents, on.tokenizer)
        sizes, arrays = text.fit(rows, config.levels, keywords=self.keywords)
        return sizes, arrays, {"tokenizer_hash": on.tokenizer.hash}

    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """Codes; tokens that the fit has not seen have codes behind the others."""
        return self.insert(space, documents, embeddings, taken, np.zeros(0, np.int64))[0]

    def insert(
        self,
        space: Fitted,
        documents: Sequence[Document],
        embeddings: np.ndarray | None,
        taken: Container[bytes],
        tokens: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Family.insert`."""
        fitted = space.arrays["vocabulary"]
        vocabulary = np.append(fitted, tokens)
        docids = text.docids(self._tokens(documents, space.require_tokenizer()), space.levels, space.arrays)
        grown = np.append(vocabulary, text.unseen(vocabulary, docids))
        return text.encode(grown, space.levels, docids), grown[len(fitted) :]

    def empty(self, codes: np.ndarray) -> int:
        """As :meth:`Family.empty`."""
        return int((codes == text.EOS).all(1).sum())

    def _tokens(self, documents: Sequence[Document], tokenizer: DocidTokenizer) -> list[list[int]]:
        return tokenizer.encode([self.source(document) for document in documents])


class Random(Family):
    """Unique random rows: memorisation alone."""

    role: ClassVar[Role] = "control"
    reachable: ClassVar[bool] = False

    def fit(self, config: CodeConfig, on: Fitting) -> Parts:
        """Room for unique rows, and the seed that they are drawn from."""
        return controls.random_sizes(config.levels, config.codes, len(on.documents)), {}, {"seed": on.seed}

    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """Rows drawn from the documents' ids."""
        return controls.encode_random(space.sizes, space.meta["seed"], documents, taken)


class Atomic(Family):
    """One code a document."""

    role: ClassVar[Role] = "control"
    growable: ClassVar[bool] = False

    def length(self, levels: int) -> int:
        """One level."""
        return 1

    def fit(self, config: CodeConfig, on: Fitting) -> Parts:
        """As many codes as documents."""
        ids = [document.id for document in on.documents]
        return np.array([len(ids)], np.int32), {}, {"ids": ids}

    def encode(
        self, space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None, taken: Container[bytes]
    ) -> np.ndarray:
        """The document's position in the corpus of the fit."""
        return controls.encode_atomic(space.meta["ids"], documents)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Quantised("rq", fit_codebooks=quantised.fit_rq),
        Quantised("pq", fit_codebooks=quantised.fit_pq, orthogonal=True),
        Quantised("opq", fit_codebooks=quantised.fit_opq, orthogonal=True),
        Tree("hkmeans"),
        Text("text.title", source=text.title_or_lead, titles=True),
        Text("text.lead", source=text.lead),
        Text("text.keywords", source=text.title_and_lead, keywords=True),
        Random("random"),
        Atomic("atomic"),
    )
}
QUANTISED = tuple(name for name, family in FAMILIES.items() if family.is_quantised)
NUMERIC = tuple(name for name, family in FAMILIES.items() if family.is_numeric)
TEXT = tuple(name for name, family in FAMILIES.items() if family.is_text)


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows at unit norm, f64[N, D]; a zero row (a text without tokens) stays zero."""
    vectors = np.asarray(embeddings, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _of_each(space: Fitted, documents: Sequence[Document], embeddings: np.ndarray | None) -> np.ndarray:
    """The documents' centred embeddings."""
    vectors = space.centred(embeddings)
    if len(vectors) != len(documents):
        raise MobulaError(f"{len(documents)} documents but {len(vectors)} embeddings; give one each")
    return vectors
