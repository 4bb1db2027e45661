"""What the `searcher` application takes and gives: its arguments, requests, events and answers."""

from __future__ import annotations

from pydantic import BaseModel, Field

from mobula.serving.app import ModelArgs, Text
from mobula.serving.application import Request


class SearcherArgs(ModelArgs):
    """Arguments of the application in cluster.yaml; its artifact is that of a finished exsearch run."""


class SolveRequest(Request):
    """A question for the agent."""

    question: Text
    max_searches: int | None = Field(None, ge=1, le=63, description="searches at most; null: as trained")
    max_tokens: int | None = Field(None, ge=1, le=1024, description="tokens of a turn at most; null: as trained")
    stream: bool = Field(True, description="server-sent events as things happen; false: one JSON at the end")


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
    """The answer, the searches that led to it, and what they took: tokens that were written, and that were given.

    ``status``: ``ok`` if the agent ended its search by itself; ``limit`` if it was closed (turns, length, a turn that
    cannot be read); ``no_retriever`` if a search failed.
    """

    answer: str
    status: str
    searches: list[Search]
    tokens: int
    prompt_tokens: int
    ms: float
    version: str
