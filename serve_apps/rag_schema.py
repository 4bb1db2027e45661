"""What the `rag` application takes and gives: its arguments, requests and answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, field_validator

from mobula.serving.app import AppArgs, Strict
from mobula.serving.paths import LocalPath


class RagArgs(AppArgs):
    """Arguments of the application in cluster.yaml."""

    artifact: LocalPath = Field(description="artifact of a finished dro run over real questions")
    reports: LocalPath | None = Field(None, description="directory whose runs the console shows")
    max_batch_size: int = Field(16, ge=1, le=1024, description="questions of one stage that are taken up together")
    select_s: float = Field(10.0, gt=0, le=600, description="time for choosing passages; after it, the retriever's")


class AnswerRequest(Strict):
    """A question."""

    question: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    stream: bool = Field(False, description="server-sent events as things happen; false: one JSON at the end")

    @field_validator("question")
    @classmethod
    def _not_blank(cls, question: str) -> str:
        if not question.strip():
            raise ValueError("the question is blank")
        return question


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
