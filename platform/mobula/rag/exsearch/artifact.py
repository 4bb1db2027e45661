"""The artifact of an `exsearch` run: the agent, the passages that it searches, and the predictor that serves it.

The predictor is built from the artifact alone: it knows no answer and no plan.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from mobula import artifacts
from mobula.alternation import Row
from mobula.artifacts import Artifact, read_jsonl, write_json, write_jsonl
from mobula.data.records import Document
from mobula.models.causal import CausalModel
from mobula.rag.exsearch.agent import Agent
from mobula.rag.exsearch.config import Mode, RetrieveConfig, RolloutConfig
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.search import Retrying, open_searcher

KIND = "searcher"
DOCUMENTS, EXAMPLES, ITERATIONS = "documents.jsonl", "examples.json", "iterations.json"


class Predictor:
    """An agent that searches and answers, greedily. ``examples``: questions by kind."""

    def __init__(
        self,
        folder: Path,
        retrieve: RetrieveConfig,
        rollout: RolloutConfig,
        mode: Mode,
        examples: Mapping[str, Sequence[str]],
    ) -> None:
        self.retrieve, self.rollout, self.mode, self.examples = retrieve, rollout, mode, examples
        self._folder = folder

    @cached_property
    def rollouts(self) -> Rollouts:
        """The agent in action; opened on first use."""
        documents = [Document(**row) for row in read_jsonl(self._folder / DOCUMENTS)]
        how = self.retrieve
        searcher = open_searcher(documents, how.kind, how.encoder)
        model = CausalModel.open(str(self._folder / "model")).placed()
        retrying = Retrying(searcher, how.timeout_s, how.retries, how.backoff_s)
        return Rollouts(model, retrying, self.rollout, self.mode, greedy=True)

    def answer(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question."""
        return [trajectory.prediction for trajectory in self.rollouts.run(questions, [0] * len(questions))]


def write(directory: Path, agent: Agent, rows: Sequence[Row], examples: Mapping[str, Sequence[str]]) -> Artifact:
    """Write the agent's model, its passages, examples of questions, and the iterations that led to it."""

    def fill(folder: Path) -> None:
        shutil.copytree(agent.model, folder / "model")
        write_jsonl(folder / DOCUMENTS, (asdict(document) for document in agent.corpus.documents()))
        write_json(folder / EXAMPLES, examples)
        write_json(folder / ITERATIONS, list(rows))

    meta = {name: asdict(getattr(agent, name)) for name in ("retrieve", "rollout", "mode")}
    return artifacts.write(directory, kind=KIND, method="exsearch", meta=meta, fill=fill)


def load(artifact: Artifact) -> Predictor:
    """Open the agent of an artifact."""
    meta = artifact.meta
    parts = RetrieveConfig(**meta["retrieve"]), RolloutConfig(**meta["rollout"]), Mode(**meta["mode"])
    return Predictor(artifact.directory, *parts, artifact.read_json(EXAMPLES))
