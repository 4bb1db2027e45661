"""Where questions and passages come from: the generated world, HotpotQA, or files of the user's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mobula.alternation import seed_of
from mobula.data.jsonl import JSONL, corpus_file, divided, load_passages
from mobula.data.multihop import hotpotqa_100
from mobula.data.questions import Question, hotpotqa
from mobula.data.records import Document
from mobula.data.worlds.words import GeneratedQuestion, Size, world
from mobula.errors import BadRecord, DataError
from mobula.evaluation.answers import normal
from mobula.rag.exsearch.config import DataConfig

SPLITS = ("warm_up", "train", "dev", "test")
SKILL_WORLDS = 8


@dataclass(frozen=True)
class Lookup:
    """One step of an oracle: what to look up, the words that settle it, and the passage that has them.

    Where a query or a fact is empty, it is the passage's title or text.
    """

    query: str
    fact: str
    passage: str


@dataclass(frozen=True)
class Problem:
    """A question with its answers (the first is the target), its gold passages, and an oracle's plan.

    ``kind`` groups problems in the report.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    support: tuple[str, ...]
    kind: str
    plan: tuple[Lookup, ...]

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Problem:
        """A problem from its JSON."""
        plan = tuple(Lookup(**step) for step in row["plan"])
        return cls(**{**row, "answers": tuple(row["answers"]), "support": tuple(row["support"]), "plan": plan})


@dataclass(frozen=True)
class Corpus:
    """Names documents that can be made again: those of a world's seed, or those of a set of questions."""

    source: str
    path: str = ""
    seed: int = 0
    size: Size = Size()

    @property
    def given(self) -> bool:
        """Whether the documents are at hand."""
        return self.source != JSONL or corpus_file(self.path) is not None

    def documents(self) -> Sequence[Document]:
        """The documents."""
        if self.source == "world":
            return world(self.seed, self.size).documents
        return _passages(self.path) if self.source == JSONL else _read(self.source, self.path)[1]


def corpus_of(config: DataConfig, split: str) -> Corpus:
    """The passages in which the questions of a split are answered: every split of the world has a seed of its own."""
    if config.source != "world":
        return Corpus(_set_of(config, split), config.path)
    size = Size(config.people, config.towns, config.firms, config.books)
    return Corpus("world", seed=seed_of(config.seed, "world", split) % 2**31, size=size)


def problems_of(config: DataConfig, split: str) -> list[Problem]:
    """The questions of a split.

    Raises:
        BadRecord: for an answer that is empty in the normal form of answers.
        DataError: for more questions than there are.
    """
    problems = MAKERS[config.source](config, split)
    for problem in problems:
        if not normal(problem.answers[0]):
            raise BadRecord(f"question {problem.id}: its answer {problem.answers[0]!r} has no word; leave it out")
    return problems


def skill_problems(config: DataConfig, count: int) -> list[tuple[Corpus, list[Problem]]]:
    """One-hop questions of other worlds, by corpus."""
    parts = []
    for number in range(SKILL_WORLDS):
        share = len(range(number, count, SKILL_WORLDS))
        if share:
            corpus = corpus_of(config, f"skill {number}")
            questions = world(corpus.seed, corpus.size).questions(share, "skill", held_out=False, hops=(1,))
            parts.append((corpus, [_problem(question) for question in questions]))
    return parts


def _world_problems(config: DataConfig, split: str) -> list[Problem]:
    corpus = corpus_of(config, split)
    questions = world(corpus.seed, corpus.size).questions(config.sizes[split] or 0, split, held_out=split == "test")
    return [_problem(question, split) for question in questions]


def _problem(question: GeneratedQuestion, split: str = "") -> Problem:
    kind = f"{len(question.chain)}-hop"
    if split == "test" and len(question.chain) == 2:  # only there, chains occur that no other split has
        kind += ", chain held out" if question.held_out else ", chain seen"
    plan = tuple(Lookup(hop.query, hop.object, hop.passage) for hop in question.plan)
    support = tuple(hop.passage for hop in question.plan)
    return Problem(question.id, question.text, (question.answer,), support, kind, plan)


def _hotpotqa_problems(config: DataConfig, split: str) -> list[Problem]:
    """A stretch of the questions in an order that the seed decides. The oracle looks the supporting titles up."""
    name = _set_of(config, split)
    problems = list(_read(name, config.path)[0])
    random.Random(config.seed).shuffle(problems)
    # Those that are drawn from the same set.
    sizes = {other: size or 0 for other, size in config.sizes.items() if _set_of(config, other) == name}
    if sum(sizes.values()) > len(problems):
        wanted = " + ".join(map(str, sizes.values()))
        raise DataError(f"data: {wanted} questions are asked for; {name} has {len(problems)}")
    start = sum(size for other, size in sizes.items() if SPLITS.index(other) < SPLITS.index(split))
    return problems[start : start + sizes[split]]


def _set_of(config: DataConfig, split: str) -> str:
    """The set that a split's questions and passages are of."""
    return config.test_set if split == "test" and config.test_set else config.source


def _own_problems(config: DataConfig, split: str) -> list[Problem]:
    """Those of a split's file; the warm-up's are of train.jsonl. The oracle takes a question's steps, or titles."""
    questions = divided(config.path, config.sizes, config.seed, supported=True)[split]
    return [_planned(q, q.steps or [("", "")] * len(q.support)) for q in questions]


@lru_cache(maxsize=2)
def _passages(path: str) -> list[Document]:
    return load_passages(path)


@lru_cache(maxsize=4)
def _read(name: str, path: str) -> tuple[list[Problem], list[Document]]:
    questions, documents = SETS[name](path)
    return [_planned(q, list(zip(q.support, q.evidence, strict=True))) for q in questions], documents


def _planned(q: Question, steps: Sequence[tuple[str, str]]) -> Problem:
    """A question whose oracle takes these steps, a query and a fact each, to the supporting passages."""
    plan = tuple(Lookup(query, fact, passage) for (query, fact), passage in zip(steps, q.support, strict=True))
    return Problem(q.id, q.text, q.answers, q.support, q.kind, plan)


SETS = {"hotpotqa": hotpotqa, "hotpotqa_100": hotpotqa_100}
MAKERS: dict[str, Callable[[DataConfig, str], list[Problem]]] = {
    "world": _world_problems,
    "hotpotqa": _hotpotqa_problems,
    JSONL: _own_problems,
}
