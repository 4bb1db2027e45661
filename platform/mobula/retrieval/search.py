"""What a search asks for and what it returns, whatever the retriever."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mobula.config import key
from mobula.data.records import Document
from mobula.errors import MobulaError

DECODERS = ("one_pass", "match", "match_rerank", "best_of_n", "beam", "chain_rescore")
AR_DECODERS = ("greedy", "beam", "exhaustive")
ALL_DECODERS = tuple(dict.fromkeys((*DECODERS, *AR_DECODERS)))
MOST_EXHAUSTIVE = 5000  # documents that decoder `exhaustive` scores one by one
ORDERS = ("confidence", "margin", "entropy", "random", "left_to_right")
SAMPLERS = ("confidence", "ancestral")
REMASK = ("none", "low_conf", "remdm")
CONSTRAINTS = ("off", "project", "bitset")


class BadSearch(MobulaError):
    """Search options that contradict each other or do not fit the model (HTTP 422)."""


class Unsupported(MobulaError):
    """The retriever cannot do this (adding documents to a family of codes that needs training, say)."""


@dataclass
class SearchOptions:
    """How to decode one request. The same keys serve as the ``decode`` section of an experiment.

    The budget is ``steps`` or ``threshold``, never both; neither means ``steps`` = L/2 (at least 1).
    """

    k: int = key(10, "documents to return", ge=1, le=1000)
    decoder: str = key("match_rerank", "how codes become a ranked list", choices=ALL_DECODERS)
    steps: int | None = key(None, "denoising steps T (the budget); null: half the code length", ge=1, le=4096)
    threshold: float | None = key(None, "commit every position at least this confident (Fast-dLLM)", gt=0, lt=1)
    order: str = key("confidence", "which masked positions to commit first", choices=ORDERS)
    sampler: str = key("confidence", "confidence (LLaDA) or ancestral (MDLM)", choices=SAMPLERS)
    schedule: str = key("linear", "positions committed per step", choices=("linear", "cosine"))
    temperature: float | None = key(None, "Gumbel noise; 0 is argmax; null: 1 for best_of_n, else 0", ge=0, le=10)
    remask: str = key("none", "whether committed positions may be revised", choices=REMASK)
    remask_conf: str = key("at_commit", "confidence of a committed token", choices=("at_commit", "leave_one_out"))
    remask_cap: float = key(0.5, "upper bound of ReMDM's re-masking rate", ge=0, le=1)
    block: int | None = key(None, "block length (must divide L); null: one block", ge=1)
    eos_conf: str = key("last", "when the end token may be committed (text docids)", choices=("free", "last"))
    eos_logit_off: float = key(0.0, "subtracted from the end token's logit (text docids)", ge=0)
    cfg: float = key(0.0, "classifier-free guidance weight; 0 is off", ge=0, le=20)
    constraint: str = key("bitset", "keep decoding inside the corpus", choices=CONSTRAINTS)
    pool: int = key(100, "candidates re-ranked by match_rerank and best_of_n", ge=1, le=100_000)
    n: int = key(8, "runs of best_of_n", ge=1, le=64)
    beam: int = key(10, "beam width", ge=1, le=256)
    beam_topc: int | None = key(None, "expansions per beam; null: twice the beam", ge=1)
    beam_per_step: int = key(1, "levels a beam fills per step", ge=1)
    beam_score: str = key("path", "final order of a beam", choices=("path", "one_pass", "mc"))
    mc: int = key(32, "draws of the Monte-Carlo bound", ge=1, le=1024)
    rescore: int = key(20, "documents chain_rescore scores anew", ge=1, le=1000)
    seed: int = key(0, "seed of this request's random numbers", ge=0)

    def problems(self) -> list[str]:
        """Contradictions that need no model to find; see :meth:`check` for the rest."""
        problems = []
        if self.threshold is not None and self.steps is not None:
            problems.append("threshold and steps exclude each other; give one budget")
        if self.threshold is not None and self.sampler == "ancestral":
            problems.append("threshold needs sampler=confidence")
        if self.threshold is not None and self.remask != "none":
            problems.append("threshold and remask exclude each other")
        if self.sampler == "ancestral" and self.remask != "none":
            problems.append("remask needs sampler=confidence")
        if self.order != "confidence" and (self.sampler == "ancestral" or self.remask != "none"):
            problems.append(
                f"order={self.order} has no effect with sampler=ancestral or remask; leave it at confidence"
            )
        if self.schedule != "linear" and (
            self.threshold is not None or self.sampler == "ancestral" or self.remask != "none"
        ):
            problems.append(f"schedule={self.schedule} has no effect with threshold, sampler=ancestral or remask")
        if self.remask_conf != "at_commit" and self.remask == "none":
            problems.append(f"remask_conf={self.remask_conf} needs remask=low_conf or remdm")
        if self.decoder == "best_of_n" and not self.is_random:
            problems.append(
                "best_of_n with temperature=0 repeats one run; set temperature, order=random or remask=remdm"
            )
        if any(isinstance(v, float) and not math.isfinite(v) for v in vars(self).values()):
            problems.append("every number must be finite")
        return problems

    def check(self, levels: int) -> None:
        """Check against a code of ``levels`` positions.

        Raises:
            BadSearch: naming what does not fit (``StepsAboveLength`` for a budget over the code length).
        """
        problems = [*self.problems(), *self.misfits(levels)]
        if problems:
            raise BadSearch("; ".join(problems))

    def misfits(self, levels: int) -> list[str]:
        """What does not fit a code of ``levels`` positions."""
        problems = []
        limit = levels if self.remask == "none" and self.sampler == "confidence" else 4 * levels
        if self.steps is not None and self.steps > limit:
            problems.append(f"StepsAboveLength: steps={self.steps} but codes have {levels} positions (at most {limit})")
        block = self.block or levels
        if levels % block:
            problems.append(f"block={block} does not divide the code length {levels}")
        elif self.threshold is None and self.budget(levels) * block % levels:
            problems.append(f"steps={self.budget(levels)} cannot be shared by {levels // block} blocks")
        if self.decoder == "beam" and levels % self.beam_per_step:
            problems.append(f"beam_per_step={self.beam_per_step} does not divide the code length {levels}")
        return problems

    @property
    def noise(self) -> float:
        """Temperature of the Gumbel noise."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.decoder == "best_of_n" else 0.0

    @property
    def is_random(self) -> bool:
        """Whether two runs with other random numbers may differ."""
        return self.noise > 0 or self.order == "random" or self.sampler == "ancestral" or self.remask == "remdm"

    def budget(self, levels: int) -> int:
        """Denoising steps for a code of ``levels`` positions."""
        return self.steps if self.steps is not None else max(1, levels // 2)


@dataclass(frozen=True)
class Hit:
    """A retrieved document."""

    doc_id: str
    score: float


@dataclass
class SearchResult:
    """Ranked hits with what they cost.

    ``nfe`` counts network calls (query encoding excluded), ``rows`` the batch rows in them; ``raw_valid`` and
    ``raw_exact`` describe the generated code before matching or projection (None where there is none, or no
    gold); ``scored_by`` says which score orders the hits; ``filled`` counts hits taken from one_pass order.
    """

    hits: list[Hit]
    nfe: int = 0
    rows: int = 0
    steps_used: int = 0
    decoder: str = ""
    constraint: str = ""
    scored_by: str = ""
    filled: int = 0
    raw_code: tuple[int, ...] | None = None
    raw_valid: bool | None = None
    raw_exact: bool | None = None
    trace: list[StepEvent] = field(default_factory=list)


@dataclass(frozen=True)
class StepEvent:
    """One denoising step: (level, code, confidence) of each commit, re-masked levels, documents still possible."""

    step: int
    commits: list[tuple[int, int, float]]
    remasked: list[int]
    valid_left: int


class Retriever(Protocol):
    """Anything that ranks documents for a text query.

    ``decoders`` are those a request may choose from, the default first; empty where there is nothing to decode.
    The documents are one value that ``insert`` and ``remove`` replace as a whole and never alter. So a search under
    way sees one version of them, and ``copy.copy`` gives a retriever that changes by itself; one that is made of
    others copies these too (``__copy__``).
    """

    name: str
    decoders: tuple[str, ...]

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """Exactly min(k, N) distinct hits per query, best first. A result does not depend on its batch."""

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents without training, all or none; the new rows_version.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
            Unsupported: if this retriever cannot.
        """

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents, all or none; the new rows_version. Their ids may be added again.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """


@dataclass(frozen=True)
class InsertSummary:
    """What the default retriever made of added documents: the code of each that has one, by id.

    ``overflow`` counts those that share the last index of a full bucket or leaf, ``collisions`` those whose code
    another document has too.
    """

    codes: dict[str, list[int]]
    overflow: int = 0
    collisions: int = 0


class Searchable(Protocol):
    """What a retrieval method's ``load(artifact)`` returns: documents, retrievers over them, the denoising trace.

    It is one version of them and never changes: ``insert`` and ``remove`` give another one, or raise.
    """

    @property
    def documents(self) -> Mapping[str, Document]:
        """The documents by id."""

    @property
    def retrievers(self) -> Mapping[str, Retriever]:
        """The retrievers by name, all over the same documents."""

    @property
    def default(self) -> str:
        """The name of the retriever that is meant where none is named."""

    @property
    def levels(self) -> int:
        """Code length of the default retriever."""

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """Denoising steps as they happen, then the result."""

    def document(self, doc_id: str) -> dict[str, Any]:
        """Title and text of a document, and its ``code`` where it has one, for display.

        Raises:
            KeyError: if there is none.
        """

    def insert(self, documents: Sequence[Document]) -> tuple[Searchable, InsertSummary]:
        """With documents that every retriever which can takes without training.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
            Unsupported: if the default retriever cannot take documents.
        """

    def remove(self, doc_ids: Sequence[str]) -> Searchable:
        """Without documents.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """

    def prepare(self) -> None:
        """Build what the first searches would otherwise wait for."""
