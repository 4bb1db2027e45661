"""What a `dro` run leaves to be served: both networks, and what they choose from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobula import artifacts
from mobula.artifacts import Artifact, write_json
from mobula.config import unchecked
from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.data.worlds.two_hop import FactQuestions
from mobula.errors import ArtifactError
from mobula.experiment import Run
from mobula.models.language_model import TORCH
from mobula.rag.candidates import VECTORS, Request, RetrieveConfig, as_shown
from mobula.rag.dro.config import FACTS, KINDS, Config
from mobula.rag.dro.data import FactWorld, Questions, RetrievedQuestions
from mobula.rag.dro.networks import Networks
from mobula.rag.em import Checkpoint
from mobula.rag.search import Retrying
from mobula.rag.searchers import DOCUMENTS, StoredCorpus, searcher_of
from mobula.rag.stored_search import find_index, index_facts

RETRIEVED, TOY = "rag", "rag_toy"  # kinds of artifact
EXAMPLE_FILE = "examples.json"
EXAMPLES = 8  # questions for people who want to try an artifact
SECTIONS = ("model", "retrieve", "select")


def write(run: Run, questions: Questions, checkpoint: Checkpoint) -> None:
    """The networks of a checkpoint, and the passages that they choose from."""
    config = questions.config

    def fill(folder: Path) -> None:
        for kind in KINDS:
            shutil.copyfile(checkpoint[kind], folder / f"{kind}.safetensors")
        if isinstance(questions, RetrievedQuestions):
            for name in () if questions.found else (DOCUMENTS, VECTORS):
                shutil.copyfile(questions.directory / name, folder / name)
            write_json(folder / EXAMPLE_FILE, [one.text for one in questions.candidates.splits["dev"][:EXAMPLES]])

    meta: dict[str, Any] = {name: asdict(getattr(config, name)) for name in SECTIONS}
    if isinstance(questions, RetrievedQuestions):
        meta |= {"hash": questions.base_hash, "index": index_facts(config.retrieve.index)}
    kind = TOY if config.data.source == FACTS else RETRIEVED
    artifacts.write(run.artifact_directory, kind=kind, method="dro", meta=meta, fill=fill)


def load(artifact: Artifact) -> Predictor | ToyPredictor:
    """Open the networks of an artifact.

    Raises:
        ArtifactError: if the model or encoder under its networks is not the one that they were trained on, or the index
            that it searches is not there.
    """
    values = {name: artifact.meta[name] for name in SECTIONS}
    # Whatever it was trained on, it is asked questions of anyone.
    config = unchecked(Config, {"method": "dro", **values}, source=str(artifact.directory))
    weights = {kind: artifact.path(f"{kind}.safetensors") for kind in KINDS}
    if artifact.kind == TOY:
        return ToyPredictor(Networks.of(FactWorld(config, artifact.directory), **weights))
    passages, retrieve = StoredCorpus(artifact.directory), config.retrieve
    retrieve.index = find_index(artifact.meta.get("index"), artifact.directory)
    config.model.engine.kind = TORCH  # an engine would want the networks in other files than an artifact has
    searcher = None if passages.given else searcher_of(retrieve, None)
    questions = RetrievedQuestions(config, artifact.directory, searcher)
    if questions.base_hash != artifact.meta["hash"]:
        under = config.model.base or config.retrieve.encoder
        raise ArtifactError(f"{artifact.directory}: was trained on other files of {under!r} than those that are here")
    own = questions.candidates
    searching = Retrying(searcher or searcher_of(retrieve, own.documents, own.vectors), retrieve.timeout_s)
    return Predictor(Networks.of(questions, **weights), searching, artifact.read_json(EXAMPLE_FILE))


@dataclass(frozen=True)
class Pick:
    """A chosen passage: its rank among the candidates as the retriever ranks them, from 1, and its probability."""

    document: Document
    rank: int
    probability: float | None


@dataclass
class Predictor:
    """Questions of anyone, answered: find passages, choose some, answer from them."""

    networks: Networks
    searcher: Retrying
    examples: Sequence[str]

    @property
    def config(self) -> RetrieveConfig:
        """How passages are found."""
        return self.networks.questions.config.retrieve

    def find(self, question: str) -> tuple[Request, bool]:
        """A question with its candidates, and whether the retriever failed; then there are none."""
        (reply,) = self.searcher.ask([question], self.config.candidates)
        request = Question("", question, (), ())
        return as_shown(request, [hit.id for hit in reply.hits], "", self.config.order, 0), reply.failed

    def select(self, request: Request) -> list[Pick]:
        """What the selector chooses."""
        (selection,) = self.networks.selector.select([request])
        probabilities = [math.exp(log_prob) for log_prob in selection.log_probs]
        return self._picks(request, selection.permutation, probabilities or [None] * len(selection.permutation))

    def first(self, request: Request) -> list[Pick]:
        """What the retriever ranks first, for when the selector cannot be asked."""
        order = sorted(range(len(request.ranks)), key=request.ranks.__getitem__)[: self.config.choose]
        return self._picks(request, order, [None] * len(order))

    def answer(self, request: Request, picks: Sequence[Pick]) -> str:
        """The answer from chosen passages; nothing from none."""
        permutation = [request.ranks.index(pick.rank) for pick in picks]
        return self.networks.generator.answer([request], [permutation])[0] if permutation else ""

    def _picks(self, request: Request, permutation: Sequence[int], probabilities: Sequence[float | None]) -> list[Pick]:
        documents = [self.searcher.searcher.document(request.candidates[i]) for i in permutation]
        parts = zip(documents, permutation, probabilities, strict=True)
        return [Pick(document, request.ranks[i], probability) for document, i, probability in parts]


@dataclass
class ToyPredictor:
    """The networks of the generated world."""

    networks: Networks

    def answer(self, questions: FactQuestions) -> tuple[list[list[int]], list[int]]:
        """The facts chosen for each question, from 1 and in their order, and its answer."""
        permutations = [one.permutation for one in self.networks.selector.select(questions)]
        answers = self.networks.generator.answer(questions, permutations)
        return [[i + 1 for i in permutation] for permutation in permutations], [int(answer) for answer in answers]
