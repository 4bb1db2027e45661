"""An agent: a model in a corpus, opened on first use; and what it makes of questions that it answers greedily."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mobula.cluster.pool import Row
from mobula.models.causal import CausalModel
from mobula.models.engines import by_torch, open_model
from mobula.models.language_model import EngineConfig, LanguageModel
from mobula.models.text import hash_files
from mobula.portable import Portable
from mobula.rag.exsearch.config import Mode, RetrieveConfig, RolloutConfig
from mobula.rag.exsearch.data import Problem
from mobula.rag.exsearch.measures import measure
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.exsearch.trajectory import Trajectory
from mobula.rag.search import Retrying, Searcher, Shuffled
from mobula.rag.searchers import Corpus, open_corpus
from mobula.threads import one_thread

log = logging.getLogger(__name__)


@dataclass
class Agent(Portable):
    """Where a model is saved, and what it searches. Nothing of it knows an answer.

    ``shuffled``: the passages of a search are permuted. ``engine``: who samples; None: PyTorch.
    """

    model: Path
    corpus: Corpus
    retrieve: RetrieveConfig
    rollout: RolloutConfig
    mode: Mode
    shuffled: bool = False
    engine: EngineConfig | None = None

    @cached_property
    def opened(self) -> CausalModel:
        """The model as it is trained, which scores."""
        return CausalModel.open(str(self.model)).placed()

    @cached_property
    def sampler(self) -> LanguageModel:
        """Who samples: the same, or an engine that has its files."""
        return self.opened if by_torch(self.engine) else open_model(str(self.model), self.engine)

    @cached_property
    def snapshot(self) -> str:
        """Identity of its weights."""
        return hash_files(sorted(self.model.glob("*.safetensors")))[:16]

    @cached_property
    def searcher(self) -> Retrying:
        """The searcher, tried again where it fails."""
        retrieve, searcher = self.retrieve, open_corpus(self.corpus, self.retrieve)
        index: Searcher = Shuffled(searcher) if self.shuffled else searcher
        return Retrying(index, retrieve.timeout_s, retrieve.retries, retrieve.backoff_s)

    def rollouts(self, *, greedy: bool) -> Rollouts:
        """The agent in action."""
        return Rollouts(self.sampler, self.searcher, self.rollout, self.mode, greedy)

    def gold(self, answers: Sequence[str]) -> list[int]:
        """The tokens of the answer that is scored and learned, the first one, with the end of the turn."""
        return [*self.opened.encode(answers[0]), self.opened.eos]


@dataclass
class SolveWorker:
    """Items of problems to rows ``{query, stratum, prediction, ..., trajectory}``: solved greedily, then measured.

    The agent is given nothing but the question. ``direct``: it answers at once, from one search if its mode searches.
    A question at which the agent fails is a row like the others: without an answer, with ``error``.
    """

    agent: Agent
    direct: bool = False

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`; nothing is drawn."""
        problems = [Problem.read(item) for item in items]
        rollouts = self.agent.rollouts(greedy=True)
        run = rollouts.direct if self.direct else rollouts.run
        with one_thread():
            results = _answer_all(run, [problem.question for problem in problems])
        document = self.agent.searcher.searcher.document
        return [
            {
                "query": problem.id,
                "stratum": problem.kind,
                "prediction": trajectory.prediction,
                **measure(problem, trajectory, document),
                "error": error,
                "trajectory": trajectory.transcript(),
            }
            for problem, (trajectory, error) in zip(problems, results, strict=True)
        ]


def _answer_all(
    run: Callable[[list[str], list[int]], list[Trajectory]], questions: list[str]
) -> list[tuple[Trajectory, str]]:
    """A trajectory for every question, and its error.

    Where a batch fails, its questions are tried one by one: no question leaves the denominator because of another, and
    one that fails alone has an empty trajectory and its error.
    """
    try:
        return [(trajectory, "") for trajectory in run(questions, [0] * len(questions))]
    except Exception as error:
        log.exception("%d questions could not be answered", len(questions))
        if len(questions) == 1:
            return [(Trajectory(), f"{type(error).__name__}: {error}")]
        return [result for question in questions for result in _answer_all(run, [question])]
