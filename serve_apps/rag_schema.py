"""What the `rag` application takes and gives: its arguments, requests and answers."""

from __future__ import annotations

from pydantic import BaseModel, Field

from mobula.serving.app import ModelArgs, Text
from mobula.serving.application import Request


class RagArgs(ModelArgs):
    """Arguments of the application in cluster.yaml; its artifact is that of a finished dro run over real questions."""

    select_s: float = Field(10.0, gt=0, le=600, description="time for choosing passages; after it, the retriever's")


class AnswerRequest(Request):
    """A question."""

    question: Text


class Candidate(BaseModel):
    """A passage that was found, by its rank."""

    id: str
    title: str
    rank: int


class Chosen(Candidate):
    """A passage that was chosen; ``probability`` after those before it, null where the selector gives none."""

    text: str
    probability: float | None


class Flags(BaseModel):
    """What went wrong, and was got over. Without the retriever there is no passage, and the answer is empty.

    Without the selector, the passages are those that the retriever ranks first.
    """

    retriever_failed: bool
    selection_failed: bool


class Answered(BaseModel):
    """The answer, the passages that it is from in the order chosen, and those that they were chosen from."""

    answer: str
    passages: list[Chosen]
    candidates: list[Candidate]
    flags: Flags
    ms: float
    version: str
