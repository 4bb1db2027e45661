"""Candidates: the passages retrieved for every question of a set, found once, frozen and kept on disk."""

from __future__ import annotations

import itertools
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
from mobula.data import jsonl
from mobula.data.pseudo_queries import body
from mobula.data.questions import Question, hotpotqa, natural_questions
from mobula.data.records import Document
from mobula.errors import DataError
from mobula.evaluation.answers import holds
from mobula.rag.search import Retrying, Searcher, encoder_of
from mobula.rag.searchers import (
    DOCUMENTS,
    SearchConfig,
    StoredCorpus,
    require_passages,
    searcher_of,
    write_documents,
)

log = logging.getLogger(__name__)
SETS = {"nq": natural_questions, "hotpotqa": hotpotqa}
RETRIEVER_ERROR, TOO_FEW = "retriever_error", "too_few_candidates"
BATCH = 20  # questions that are asked together: so many are lost where a search fails for good
VECTORS, FACTS = "vectors.safetensors", "candidates.json"


@dataclass
class RetrieveConfig(SearchConfig):
    """Which passages a question's answer is chosen from."""

    pool: str = key(
        "corpus", "corpus: the passages of all questions; own: those a question comes with", choices=("corpus", "own")
    )
    candidates: int = key(20, "passages found for a question (n)", ge=2, le=100)
    choose: int = key(3, "passages that are chosen of them (K)", ge=1, le=20)
    order: str = key("shuffled", "in which order candidates are shown", choices=("shuffled", "retriever"))

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        problems = super().problems()
        if self.choose > self.candidates:
            problems.append(f"choose={self.choose} passages of candidates={self.candidates} is not possible")
        if (self.url or self.index) and self.pool == "own":
            problems.append(f"{'url' if self.url else 'index'} ranks the whole corpus; use pool=corpus with it")
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
    """Counts and a hash of questions and passages, and how many questions have no candidates, and why.

    ``found``: the passages are those that were found for the questions, of a corpus that whoever answered has.
    """

    source: str
    questions: int
    passages: int
    sha256: str
    retriever_errors: int
    too_few: int
    found: bool = False


@dataclass(frozen=True, eq=False)
class Candidates:
    """Questions by split with their candidates, the corpus, and the corpus's vectors f32[N, D].

    ``searcher``: who has further documents, where these are not the whole corpus.
    """

    splits: Mapping[str, list[Request]]
    documents: list[Document]
    vectors: np.ndarray
    searcher: Searcher | None = None
    rows: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows.update({document.id: row for row, document in enumerate(self.documents)})

    @classmethod
    def of(cls, searcher: Searcher) -> Candidates:
        """Of no question yet, with a searcher that has all documents."""
        return cls({}, [], np.zeros((0, 0), dtype=np.float32), searcher)

    def document(self, id: str) -> Document:
        """A document of the corpus."""
        if self.searcher and id not in self.rows:
            return self.searcher.document(id)
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
    directory: Path, source: str, path: str, sizes: Mapping[str, int | None], config: RetrieveConfig, seed: int
) -> CandidateFacts:
    """Read a question set, divide it and find candidates, once; what ``directory`` then holds.

    Raises:
        DataError: if there are not as many questions as ``sizes`` asks for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / FACTS
    if not file.is_file():
        splits, given = _read(source, path, sizes, config, seed)
        vectors = None if given is None else _vectors(directory, given, config)
        searcher = searcher_of(config, given, vectors)
        requests = {name: retrieve(part, searcher, config, seed) for name, part in splits.items()}
        documents = _found(requests, searcher) if given is None else given
        if given is None:
            (directory / VECTORS).unlink(missing_ok=True)  # an attempt before this one may have found others
            _vectors(directory, documents, config)
        write_documents(directory, documents)
        for name, part in requests.items():
            write_jsonl(directory / f"{name}.jsonl", map(asdict, part))
        flags = [request.flag for part in requests.values() for request in part]
        hashed = digest([[asdict(request) for request in part] for part in requests.values()])
        counts = (len(flags), len(documents), hashed, flags.count(RETRIEVER_ERROR), flags.count(TOO_FEW))
        write_json(file, asdict(CandidateFacts(path or f"MOBULA_DATA, {source}", *counts, found=given is None)))
        open_candidates.cache_clear()
    return CandidateFacts(**json.loads(file.read_text()))


@lru_cache(maxsize=4)
def open_candidates(directory: Path) -> Candidates:
    """The candidates that :func:`prepare` wrote, or the passages of an artifact, which has no splits."""
    rows = {file.stem: read_jsonl(file) for file in directory.glob("*.jsonl") if file.name != DOCUMENTS}
    splits = {name: [_request(row) for row in part] for name, part in rows.items()}
    documents = list(StoredCorpus(directory).documents())
    return Candidates(splits, documents, load_file(directory / VECTORS)["vectors"])


def _read(
    source: str, path: str, sizes: Mapping[str, int | None], config: RetrieveConfig, seed: int
) -> tuple[dict[str, list[Question]], list[Document] | None]:
    """Questions by split, and all passages; None if whoever answers has them."""
    if source == jsonl.JSONL:
        splits = jsonl.divided(path, sizes, seed)
        given = jsonl.corpus_file(path) is not None and not config.index
        own = jsonl.load_passages(path) if given else None
        support = {question.id: question.support for question in itertools.chain(*splits.values())}
        require_passages(support, path, config, own)
        return splits, own
    questions, documents = SETS[source](path)
    return divided(_fitting(questions, config), {name: size or 0 for name, size in sizes.items()}, seed), documents


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


def retrieve(questions: Sequence[Question], searcher: Searcher, config: RetrieveConfig, seed: int) -> list[Request]:
    """Every question with its candidates; one that nobody answered, or that has fewer than K, has a flag and none."""
    size = searcher.size or config.candidates
    depth = size if config.pool == "own" else min(size, config.candidates)
    texts, asking = [question.text for question in questions], Retrying(searcher, config.timeout_s)
    replies = [one for at in range(0, len(texts), BATCH) for one in asking.ask(texts[at : at + BATCH], depth)]
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


def _found(splits: Mapping[str, Sequence[Request]], searcher: Searcher) -> list[Document]:
    """The passages of all candidates, by id."""
    ids = {id for part in splits.values() for request in part for id in request.candidates}
    return [searcher.document(id) for id in sorted(ids)]


def _request(row: dict[str, object]) -> Request:
    return Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})  # type: ignore[arg-type]
