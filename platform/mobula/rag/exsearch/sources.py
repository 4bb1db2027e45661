"""Where questions and passages come from: the generated world, or HotpotQA."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mobula.alternation import seed_of
from mobula.data.questions import hotpotqa
from mobula.data.records import Document
from mobula.errors import BadRecord, DataError
from mobula.evaluation.answers import normal
from mobula.rag.exsearch.config import DataConfig
from mobula.rag.exsearch.world import Asked, Size, world

SPLITS = ("warm_up", "train", "dev", "test")
SKILL_WORLDS = 8


@dataclass(frozen=True)
class Lookup:
    """One step of an oracle: what to look up, the words that settle it, and the passage that has them."""

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


@dataclass(frozen=True)
class Corpus:
    """Names documents that can be made again: those of a world's seed, or those of a set of questions."""

    source: str
    path: str = ""
    seed: int = 0
    size: Size = Size()

    def documents(self) -> Sequence[Document]:
        """The documents."""
        return world(self.seed, self.size).documents if self.source == "world" else _hotpotqa(self.path)[1]


def corpus_of(config: DataConfig, split: str) -> Corpus:
    """The passages in which the questions of a split are answered: every split of the world has a seed of its own."""
    if config.source != "world":
        return Corpus(config.source, config.path)
    size = Size(config.people, config.towns, config.firms, config.books)
    return Corpus("world", seed=seed_of(config.seed, "world", split) % 2**31, size=size)


def problems_of(config: DataConfig, split: str) -> list[Problem]:
    """The questions of a split.

    Raises:
        BadRecord: for an answer that is empty in the normal form of answers.
        DataError: for more questions than there are.
    """
    found = MAKERS[config.source](config, split)
    for problem in found:
        if not normal(problem.answers[0]):
            raise BadRecord(f"question {problem.id}: its answer {problem.answers[0]!r} has no word; leave it out")
    return found


def skill_problems(config: DataConfig, count: int) -> list[tuple[Corpus, list[Problem]]]:
    """One-hop questions of other worlds, by corpus."""
    found = []
    for number in range(SKILL_WORLDS):
        share = len(range(number, count, SKILL_WORLDS))
        if share:
            corpus = corpus_of(config, f"skill {number}")
            asked = world(corpus.seed, corpus.size).questions(share, "skill", held_out=False, hops=(1,))
            found.append((corpus, [_problem(question) for question in asked]))
    return found


def _world_problems(config: DataConfig, split: str) -> list[Problem]:
    corpus = corpus_of(config, split)
    asked = world(corpus.seed, corpus.size).questions(getattr(config, split), split, held_out=split == "test")
    return [_problem(question) for question in asked]


def _problem(asked: Asked) -> Problem:
    kind = f"{len(asked.chain)}-hop" + (", chain held out" if asked.held_out else "")
    plan = tuple(Lookup(hop.query, hop.found, hop.passage) for hop in asked.plan)
    return Problem(asked.id, asked.text, (asked.answer,), tuple(hop.passage for hop in asked.plan), kind, plan)


def _hotpotqa_problems(config: DataConfig, split: str) -> list[Problem]:
    """A stretch of the questions in an order that the seed decides. The oracle looks the supporting titles up."""
    problems = list(_hotpotqa(config.path)[0])
    random.Random(config.seed).shuffle(problems)
    sizes = [getattr(config, name) for name in SPLITS]
    if sum(sizes) > len(problems):
        raise DataError(f"data: {' + '.join(map(str, sizes))} questions are asked for; hotpotqa has {len(problems)}")
    start = sum(sizes[: SPLITS.index(split)])
    return problems[start : start + sizes[SPLITS.index(split)]]


@lru_cache(maxsize=2)
def _hotpotqa(path: str) -> tuple[list[Problem], list[Document]]:
    questions, documents = hotpotqa(path)
    problems = [
        Problem(q.id, q.text, q.answers, q.support, q.kind, tuple(map(Lookup, q.support, q.evidence, q.support)))
        for q in questions
    ]
    return problems, documents


MAKERS: dict[str, Callable[[DataConfig, str], list[Problem]]] = {
    "world": _world_problems,
    "hotpotqa": _hotpotqa_problems,
}
