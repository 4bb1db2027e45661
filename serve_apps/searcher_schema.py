"""What the `searcher` application takes and gives: its arguments, requests, events and answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, field_validator

from mobula.serving.app import AppArgs, Strict
from mobula.serving.paths import LocalPath


class SearcherArgs(AppArgs):
    """Arguments of the application in cluster.yaml."""

    artifact: LocalPath = Field(description="artifact of a finished exsearch run")
    reports: LocalPath | None = Field(None, description="directory whose runs the console shows")
    max_batch_size: int = Field(16, ge=1, le=1024, description="questions whose turns are written together")


class SolveRequest(Strict):
    """A question for the agent."""

    question: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    max_searches: int | None = Field(None, ge=1, le=63, description="searches at most; null: as trained")
    max_tokens: int | None = Field(None, ge=1, le=1024, description="tokens of a turn at most; null: as trained")
    stream: bool = Field(True, description="server-sent events as things happen; false: one JSON at the end")

    @field_validator("question")
    @classmethod
    def _not_blank(cls, question: str) -> str:
        if not question.strip():
            raise ValueError("the question is blank")
        return question


class Passage(BaseModel):
    """A passage that was shown to the agent; ``rank`` is that of the search."""

    id: str
    title: str
    text: str
    rank: int
    score: float


class Search(BaseModel):
    """A sub-query, what was shown for it, and the fact that was recorded; null where the agent recorded none."""

    query: str
    evidence: list[Passage]
    fact: str | None


class Solved(BaseModel):
    """The answer, the searches that led to it, and what they took.

    ``status``: ``ok`` if the agent ended its search by itself; ``limit`` if it was closed (turns, length, a turn that
    cannot be read); ``no_retriever`` if a search failed.
    """

    answer: str
    status: str
    searches: list[Search]
    tokens: int
    ms: float
    version: str
