"""A small real retriever for the tests of serving: documents ranked by shared words, with steps that take time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mobula import artifacts, methods
from mobula.cancellation import raise_if_cancelled
from mobula.data.records import Document
from mobula.methods import Entry
from mobula.retrieval.retrievers import BY_PARADIGM
from mobula.retrieval.search import Hit, SearchOptions, SearchResult, StepEvent, Unsupported

LEVELS = 4
TEXTS = {
    "d1": ("Cats", "cats sleep most of the day and hunt at night"),
    "d2": ("Dogs", "dogs like long walks and bark at the mail"),
    "d3": ("Rays", "manta rays travel in large schools through warm seas"),
    "d4": ("Seas", "the warm sea holds more life than the cold one"),
}


class Words:
    """Ranks by the number of words shared with the query; ``step_s`` seconds per denoising step."""

    def __init__(self, name: str, documents: list[Document], step_s: float, heartbeat: Path | None) -> None:
        self.name, self.documents, self.step_s, self.heartbeat = name, documents, step_s, heartbeat
        self.batches: list[int] = []
        self.decoders = BY_PARADIGM["diffusion"]

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        self.batches.append(len(queries))
        if any("boom" in q for q in queries):
            raise RuntimeError("a secret detail")
        for _ in range(max(o.budget(LEVELS) for o in options)):
            raise_if_cancelled()
            self.step()
        return [self._rank(q, o) for q, o in zip(queries, options, strict=True)]

    def step(self) -> None:
        if self.heartbeat:
            with self.heartbeat.open("a") as stream:
                stream.write("x")
        time.sleep(self.step_s)

    def insert(self, documents: Sequence[Document]) -> int:
        self.documents.extend(documents)
        return len(self.documents)

    def _rank(self, query: str, options: SearchOptions) -> SearchResult:
        words = set(query.lower().split())
        score = {d.id: float(len(words & set(f"{d.title} {d.text}".lower().split()))) for d in self.documents}
        ranked = sorted(score, key=lambda i: (-score[i], i))[: options.k]
        hits = [Hit(i, score[i]) for i in ranked]
        steps = options.budget(LEVELS)
        return SearchResult(
            hits, nfe=steps, rows=steps, steps_used=steps, decoder=options.decoder, raw_code=(1, 2, 3, 4)
        )


class Toy:
    """A Searchable of two retrievers."""

    default = "words"
    levels = LEVELS

    def __init__(self, step_s: float = 0.0, heartbeat: Path | None = None, frozen: bool = False) -> None:
        documents = [Document(i, title, text) for i, (title, text) in TEXTS.items()]
        self.retrievers = {n: Words(n, documents, step_s, heartbeat) for n in ("words", "twin")}
        self.retrievers["twin"].decoders = BY_PARADIGM["autoregressive"]
        self.frozen = frozen

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        words = self.retrievers["words"]
        for step in range(1, options.budget(LEVELS) + 1):
            words.step()
            yield StepEvent(step, [(step - 1, step, 0.5)], [], max(1, LEVELS - step))
        yield words._rank(query, options)

    def document(self, doc_id: str) -> dict[str, Any]:
        found = {d.id: d for d in self.retrievers["words"].documents}[doc_id]
        return {"title": found.title, "text": found.text}

    def insert(self, documents: Sequence[Document]) -> int:
        if self.frozen:
            raise Unsupported("docid family random cannot take documents without training")
        return self.retrievers["words"].insert(documents)


def load(artifact: artifacts.Artifact) -> Toy:
    """As a method's ``load``."""
    heartbeat = artifact.meta.get("heartbeat")
    return Toy(artifact.meta["step_s"], Path(heartbeat) if heartbeat else None)


def write_artifact(directory: Path, step_s: float = 0.0, heartbeat: Path | None = None, tag: str = "") -> Path:
    """An artifact that :func:`load` reads; ``tag`` makes it differ from others."""
    artifacts.write(
        directory,
        kind="model",
        method="toy",
        meta={"step_s": step_s, "heartbeat": str(heartbeat) if heartbeat else None},
        fill=lambda folder: artifacts.write_text(folder / "texts.txt", f"toy {tag}"),
    )
    return directory


def register() -> None:
    """Put the toy into the table of methods of this process."""
    methods.METHODS["toy"] = Entry("retrieval", "tests.serving.toy", "documents ranked by shared words")
