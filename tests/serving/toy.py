"""A small real retriever for the tests of serving: documents ranked by shared words, with steps that take time."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mobula import artifacts, methods
from mobula.cancellation import raise_if_cancelled
from mobula.data.records import Document
from mobula.methods import Entry
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.search import Hit, InsertSummary, SearchOptions, SearchResult, StepEvent, Unsupported

LEVELS = 4
TEXTS = {
    "d1": ("Cats", "cats sleep most of the day and hunt at night"),
    "d2": ("Dogs", "dogs like long walks and bark at the mail"),
    "d3": ("Rays", "manta rays travel in large schools through warm seas"),
    "d4": ("Seas", "the warm sea holds more life than the cold one"),
}


class Words:
    """Ranks by the number of words shared with the query; ``step_s`` seconds per denoising step."""

    def __init__(self, name: str, documents: dict[str, Document], step_s: float, heartbeat: Path | None) -> None:
        self.name, self.documents, self.step_s, self.heartbeat = name, documents, step_s, heartbeat
        self.decoders = PARADIGMS["diffusion"].decoders

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
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
        self.documents = {**self.documents, **{d.id: d for d in documents}}
        return len(self.documents)

    def remove(self, doc_ids: Sequence[str]) -> int:
        self.documents = {i: d for i, d in self.documents.items() if i not in doc_ids}
        return len(self.documents)

    def _rank(self, query: str, options: SearchOptions) -> SearchResult:
        words = set(query.lower().split())
        score = {i: float(len(words & set(f"{d.title} {d.text}".lower().split()))) for i, d in self.documents.items()}
        ranked = sorted(score, key=lambda i: (-score[i], i))[: options.k]
        hits = [Hit(i, score[i]) for i in ranked]
        steps = options.budget(LEVELS)
        return SearchResult(
            hits, nfe=steps, rows=steps, steps_used=steps, decoder=options.decoder, raw_code=(1, 2, 3, 4)
        )


class Toy:
    """A Searchable of two retrievers. Adding takes ``add_s`` seconds and first writes its process id to ``writer``."""

    default = "words"
    levels = LEVELS

    def __init__(
        self,
        step_s: float = 0.0,
        heartbeat: Path | None = None,
        frozen: bool = False,
        add_s: float = 0.0,
        writer: Path | None = None,
    ) -> None:
        documents = {i: Document(i, title, text) for i, (title, text) in TEXTS.items()}
        self.retrievers = {n: Words(n, documents, step_s, heartbeat) for n in ("words", "twin")}
        self.retrievers["twin"].decoders = PARADIGMS["autoregressive"].decoders
        self.frozen, self.add_s, self.writer = frozen, add_s, writer

    @property
    def documents(self) -> dict[str, Document]:
        return self.retrievers["words"].documents

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        words = self.retrievers["words"]
        for step in range(1, options.budget(LEVELS) + 1):
            words.step()
            yield StepEvent(step, [(step - 1, step, 0.5)], [], max(1, LEVELS - step))
        yield words._rank(query, options)

    def document(self, doc_id: str) -> dict[str, Any]:
        found = self.documents[doc_id]
        return {"title": found.title, "text": found.text}

    def insert(self, documents: Sequence[Document]) -> tuple[Toy, InsertSummary]:
        if self.frozen:
            raise Unsupported("docid family random cannot take documents without training")
        if self.writer:
            self.writer.write_text(str(os.getpid()))
        time.sleep(self.add_s)
        return self._changed("insert", documents), InsertSummary({d.id: [1, 2, 3, 4] for d in documents})

    def remove(self, doc_ids: Sequence[str]) -> Toy:
        return self._changed("remove", doc_ids)

    def prepare(self) -> None:
        pass

    def _changed(self, method: str, argument: Any) -> Toy:
        other = copy.copy(self)
        other.retrievers = {name: copy.copy(retriever) for name, retriever in self.retrievers.items()}
        for retriever in other.retrievers.values():
            getattr(retriever, method)(argument)
        return other


def planned_changes(number: int) -> tuple[list[tuple[str, dict[str, Any]]], list[dict[str, str]]]:
    """Requests that each lead to the next version, and the documents (id -> title) of every version from 0 on.

    No two versions have the same documents: every third removes one, which then comes back under another title.
    """
    documents = {i: title for i, (title, _) in TEXTS.items()}
    states: list[dict[str, str]] = [documents]
    requests: list[tuple[str, dict[str, Any]]] = []
    gone: list[str] = []
    for version in range(1, number + 1):
        if version % 3 == 0:
            gone = [next(i for i in documents if i not in TEXTS)]
            requests.append(("/documents/remove", {"ids": gone}))
            documents = {i: title for i, title in documents.items() if i not in gone}
        else:
            added, gone = gone or [f"n{version}"], []
            new = [{"id": i, "title": f"marker {version}", "text": "marker of the deep"} for i in added]
            requests.append(("/documents", {"documents": new}))
            documents = {**documents, **dict.fromkeys(added, f"marker {version}")}
        states.append(documents)
    return requests, states


def load(artifact: artifacts.Artifact) -> Toy:
    """As a method's ``load``."""
    paths = {name: Path(artifact.meta[name]) for name in ("heartbeat", "writer") if artifact.meta[name]}
    return Toy(artifact.meta["step_s"], add_s=artifact.meta["add_s"], **paths)


def write_artifact(
    directory: Path,
    step_s: float = 0.0,
    heartbeat: Path | None = None,
    tag: str = "",
    add_s: float = 0.0,
    writer: Path | None = None,
) -> Path:
    """An artifact that :func:`load` reads; ``tag`` makes it differ from others."""
    meta = {"step_s": step_s, "add_s": add_s, "heartbeat": heartbeat, "writer": writer}
    artifacts.write(
        directory,
        kind="model",
        method="toy",
        meta={name: str(value) if isinstance(value, Path) else value for name, value in meta.items()},
        fill=lambda folder: artifacts.write_text(folder / "texts.txt", f"toy {tag}"),
    )
    return directory


def register() -> None:
    """Put the toy into the table of methods of this process."""
    methods.METHODS["toy"] = Entry("retrieval", "tests.serving.toy", "documents ranked by shared words")
