"""Questions of anyone, answered by an artifact's networks: find passages, choose some, answer from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from safetensors.torch import load_file

from mobula.artifacts import Artifact, read_jsonl
from mobula.config import build
from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.errors import ArtifactError
from mobula.models.pretrained import Pretrained
from mobula.rag.candidates import DOCUMENTS, Asked, RetrieveConfig, searcher_of, shown
from mobula.rag.dro.asked import Positions
from mobula.rag.dro.config import Config
from mobula.rag.dro.language import networks as language
from mobula.rag.dro.pair import KINDS
from mobula.rag.dro.passages import networks as passages
from mobula.rag.dro.questions import EXAMPLE_FILE, VECTOR_FILE
from mobula.rag.search import Retrying, encoder_of

KIND = "rag"  # of an artifact


class Chooser(Protocol):
    """Networks that answer one question with its candidates at a time."""

    def pick(self, asked: Asked) -> tuple[Positions, list[float]]:
        """The greedy order, and the probability of each choice after those before it; none where there are none."""

    def reply(self, asked: Asked, order: Positions) -> str:
        """The answer from passages in their order."""


@dataclass(frozen=True)
class Pick:
    """A chosen passage: its place among the candidates as the retriever ranks them, from 1, and its probability."""

    document: Document
    rank: int
    probability: float | None


class Predictor:
    """The networks of an artifact, the passages, and what finds them."""

    def __init__(self, searcher: Retrying, config: RetrieveConfig, chooser: Chooser, examples: Sequence[str]) -> None:
        self.searcher, self.config, self.chooser, self.examples = searcher, config, chooser, examples

    def find(self, question: str) -> tuple[Asked, bool]:
        """A question with its candidates, and whether the retriever failed; then there are none."""
        (reply,) = self.searcher.ask([question], self.config.candidates)
        asked = Question("", question, (), ())
        return shown(asked, [hit.id for hit in reply.hits], "", self.config.order, 0), reply.failed

    def select(self, asked: Asked) -> list[Pick]:
        """What the selector chooses."""
        order, probabilities = self.chooser.pick(asked)
        return self._picks(asked, order, probabilities or [None] * len(order))

    def first(self, asked: Asked) -> list[Pick]:
        """What the retriever ranks first, for when the selector cannot be asked."""
        order = sorted(range(len(asked.ranks)), key=asked.ranks.__getitem__)[: self.config.choose]
        return self._picks(asked, order, [None] * len(order))

    def answer(self, asked: Asked, picks: Sequence[Pick]) -> str:
        """The answer from chosen passages; nothing from none."""
        order = [asked.ranks.index(pick.rank) for pick in picks]
        return self.chooser.reply(asked, order) if order else ""

    def _picks(self, asked: Asked, order: Positions, probabilities: Sequence[float | None]) -> list[Pick]:
        documents = [self.searcher.searcher.document(asked.candidates[place]) for place in order]
        parts = zip(documents, order, probabilities, strict=True)
        return [Pick(document, asked.ranks[place], probability) for document, place, probability in parts]


def load(artifact: Artifact) -> Predictor:
    """Open an artifact of real questions.

    Raises:
        ArtifactError: if the model or encoder under its networks is not the one that they were trained on.
    """
    values = {name: artifact.meta[name] for name in ("model", "retrieve", "select")}
    config = build(Config, {"method": "dro", "data": {"source": "nq"}, **values}, source=str(artifact.directory))
    under = config.model.base or config.retrieve.encoder
    found = Pretrained.find(under).hash if config.model.base else encoder_of(under).hash
    if found != artifact.meta["hash"]:
        raise ArtifactError(f"{artifact.directory}: was trained on other files of {under!r} than those that are here")
    documents = [Document(**row) for row in read_jsonl(artifact.path(DOCUMENTS))]
    weights = {kind: artifact.path(f"{kind}.safetensors") for kind in KINDS}
    vectors = load_file(artifact.path(VECTOR_FILE))["vectors"].numpy()
    opened = language.open_chooser if config.model.base else passages.open_chooser
    chooser = opened(config, weights, documents, vectors)
    searcher = Retrying(searcher_of(documents, config.retrieve, vectors), config.retrieve.timeout_s)
    return Predictor(searcher, config.retrieve, chooser, artifact.read_json(EXAMPLE_FILE))
