"""What actors do in EXSEARCH: sample trajectories, score gold answers after them, and solve questions.

Items and rows are JSON, and a row depends on its item and its worker's own seed alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mobula.alternation import Row, seed_of
from mobula.data.records import Document
from mobula.errors import MobulaError
from mobula.evaluation.answers import holds
from mobula.models.causal import CausalModel
from mobula.models.text import hash_files
from mobula.rag.exsearch.config import Mode, RetrieveConfig, RolloutConfig
from mobula.rag.exsearch.measures import SCORES, judge
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.exsearch.sources import Corpus, Lookup, Problem
from mobula.rag.exsearch.trajectory import TrainRow, Trajectory, rows
from mobula.rag.objective import ANSWER
from mobula.rag.search import Found, Retrying, Searcher, open_searcher
from mobula.threads import one_thread

log = logging.getLogger(__name__)


class SnapshotMismatch(MobulaError):
    """Samples of another model than the one that is to score them."""


@lru_cache(maxsize=16)
def searcher_of(corpus: Corpus, kind: str, encoder: str) -> Searcher:
    """The index of a corpus, made once a process."""
    return open_searcher(corpus.documents(), kind, encoder)


@dataclass
class Shuffled:
    """A searcher whose lists stand in another order, which the query alone decides: a probe of who reads by place."""

    searcher: Searcher

    def __post_init__(self) -> None:
        self.hash = f"{self.searcher.hash}-shuffled"

    def search(self, queries: Sequence[str], k: int) -> list[list[Found]]:
        """As :class:`mobula.rag.search.Searcher`; ranks and scores are those of the search."""
        lists = self.searcher.search(queries, k)
        return [
            random.Random(f"order {query}").sample(found, len(found))
            for query, found in zip(queries, lists, strict=True)
        ]

    def document(self, id: str) -> Document:
        """As :class:`mobula.rag.search.Searcher`."""
        return self.searcher.document(id)


@dataclass
class Agent:
    """Where a model is saved, and what it searches; opened on first use. Nothing of it knows an answer.

    ``shuffled``: what is found stands in another order.
    """

    model: Path
    corpus: Corpus
    retrieve: RetrieveConfig
    rollout: RolloutConfig
    mode: Mode
    shuffled: bool = False

    @cached_property
    def opened(self) -> CausalModel:
        """The model."""
        return CausalModel.open(str(self.model)).placed()

    @cached_property
    def snapshot(self) -> str:
        """Identity of its weights."""
        return hash_files(sorted(self.model.glob("*.safetensors")))[:16]

    @cached_property
    def searcher(self) -> Retrying:
        """The searcher, tried again where it fails."""
        how = self.retrieve
        found = searcher_of(self.corpus, how.kind, how.encoder)
        index: Searcher = Shuffled(found) if self.shuffled else found
        return Retrying(index, how.timeout_s, how.retries, how.backoff_s)

    def rollouts(self, *, greedy: bool) -> Rollouts:
        """The agent in action."""
        return Rollouts(self.opened, self.searcher, self.rollout, self.mode, greedy)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "corpus", "retrieve", "rollout", "mode", "shuffled")}


@dataclass
class SampleWorker:
    """Items ``{id, question}`` to rows ``{query, sample, snapshot, trajectory}``, ``count`` a question.

    A trajectory's seed is that of the phase, its question and its number; the shard's is not used, so it does not
    matter how questions are divided.
    """

    agent: Agent
    count: int
    seed: int

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`."""
        keys = [(item["id"], k) for item in items for k in range(self.count)]
        questions = [item["question"] for item in items for _ in range(self.count)]
        with one_thread():
            found = self.agent.rollouts(greedy=False).run(questions, [seed_of(self.seed, *key) for key in keys])
        snapshot = self.agent.snapshot
        return [
            {"query": id, "sample": k, "snapshot": snapshot, "trajectory": trajectory.to_dict()}
            for (id, k), trajectory in zip(keys, found, strict=True)
        ]


@dataclass
class ScoreWorker:
    """Rows of samples with ``answers`` to rows of scores: l = log p(y|x,z) of the gold answer, and log p(z|x).

    ``log_lik`` is null where the row is longer than the agent's chats may be.
    """

    agent: Agent

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn.

        Raises:
            SnapshotMismatch: for samples of another model.
        """
        others = {item["snapshot"] for item in items} - {self.agent.snapshot}
        if others:
            raise SnapshotMismatch(f"samples of {', '.join(sorted(others))} cannot be scored by {self.agent.snapshot}")
        model = self.agent.opened
        found = [Trajectory.read(item["trajectory"]) for item in items]
        golds = [[*model.encode(item["answers"][0]), model.eos] for item in items]
        parts = [rows(trajectory, gold, 1.0) for trajectory, gold in zip(found, golds, strict=True)]
        with one_thread():
            sums = row_sums(model, [row for part in parts for row in part])
        scored = []
        for item, trajectory, gold, part in zip(items, found, golds, parts, strict=True):
            mine = [next(sums) for _ in part]
            fits = all(len(row.ids) <= self.agent.rollout.seq_len for row in part)
            scored.append(
                {
                    "query": item["query"],
                    "sample": item["sample"],
                    "snapshot": item["snapshot"],
                    "log_lik": sum(answer for _, answer in mine) if fits else None,
                    "log_prior": sum(latent for latent, _ in mine),
                    "log_ratio": trajectory.log_ratio,
                    "answer_tokens": len(gold),
                    "queries": trajectory.queries,
                    "in_facts": float(holds(" ".join(trajectory.facts), item["answers"])),
                    "surprise": -sum(trajectory.sampled) / max(1, len(trajectory.sampled)),
                    **{name: score(trajectory.prediction, item["answers"]) for name, score in SCORES.items()},
                    **asdict(trajectory.flags),
                }
            )
        return scored


def row_sums(model: CausalModel, found: Sequence[TrainRow]) -> Any:
    """Yields (log p of latent tokens, log p of answer tokens) of every row."""
    # The first token of a row is never learned, so it can be the prompt.
    scores = model.log_probs([row.ids[:1] for row in found], [row.ids[1:] for row in found])
    for row, said in zip(found, scores, strict=True):
        latent = answer = 0.0
        for kind, value in zip(row.mask[1:], said.double().tolist(), strict=True):
            if kind == ANSWER:
                answer += value
            elif kind:
                latent += value
        yield latent, answer


@dataclass
class GapWorker:
    """Items ``{rows, before}`` to rows ``{gap}``: by how much a training has raised its own objective.

    That is sum over k of w_k (log p(z_k, y|x) - what it was ``before``).
    """

    agent: Agent

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn."""
        parts = [[TrainRow(**row) for row in item["rows"]] for item in items]
        with one_thread():
            sums = row_sums(self.agent.opened, [row for part in parts for row in part])
        found = []
        for item, part in zip(items, parts, strict=True):
            after = sum(row.weight * sum(next(sums)) for row in part)
            found.append({"gap": after - item["before"]})
        return found


@dataclass
class SolveWorker:
    """Items of problems to rows ``{query, kind, prediction, ..., trajectory}``: solved greedily, then judged.

    The agent is given nothing but the question. ``direct``: it answers at once, from one search if its mode searches.
    A question at which the agent fails is a row like the others: without an answer, with ``error``.
    """

    agent: Agent
    direct: bool = False

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn."""
        problems = [read_problem(item) for item in items]
        rollouts = self.agent.rollouts(greedy=True)
        run = rollouts.direct if self.direct else rollouts.run
        with one_thread():
            found = _kept(run, [problem.question for problem in problems])
        document = self.agent.searcher.searcher.document
        return [
            {
                "query": problem.id,
                "kind": problem.kind,
                "prediction": trajectory.prediction,
                **judge(problem, trajectory, document),
                "error": error,
                "trajectory": _told(trajectory),
            }
            for problem, (trajectory, error) in zip(problems, found, strict=True)
        ]


def _kept(
    run: Callable[[list[str], list[int]], list[Trajectory]], questions: list[str]
) -> list[tuple[Trajectory, str]]:
    """A trajectory for every question, and what went wrong with it.

    Where a batch fails, its questions are tried one by one: no question leaves the denominator because of another, and
    what fails alone has an empty trajectory and its error.
    """
    try:
        return [(trajectory, "") for trajectory in run(questions, [0] * len(questions))]
    except Exception as error:
        log.exception("%d questions could not be answered", len(questions))
        if len(questions) == 1:
            return [(Trajectory(), f"{type(error).__name__}: {error}")]
        return [found for question in questions for found in _kept(run, [question])]


def _told(trajectory: Trajectory) -> Row:
    """A trajectory for readers, without its tokens."""
    said = [turn.text for turn in trajectory.turns if turn.role == "assistant"]
    return {"said": said, "queries": trajectory.queries, "facts": trajectory.facts, "shown": trajectory.shown}


def read_problem(row: Row) -> Problem:
    """A problem from its JSON."""
    plan = tuple(Lookup(**step) for step in row["plan"])
    return Problem(**{**row, "answers": tuple(row["answers"]), "support": tuple(row["support"]), "plan": plan})
