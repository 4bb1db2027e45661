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
from mobula.artifacts import Artifact, write_json
from mobula.cluster.pool import Row
from mobula.rag.exsearch.agent import Agent
from mobula.rag.exsearch.config import Mode, RetrieveConfig, RolloutConfig
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.searchers import StoredCorpus, documents_of, write_documents
from mobula.rag.stored_search import find_index, index_facts

KIND = "searcher"
MODEL, EXAMPLES, ITERATIONS = "model", "examples.json", "iterations.json"


class Predictor:
    """An agent that searches and answers, greedily. ``examples``: questions by kind."""

    def __init__(self, agent: Agent, examples: Mapping[str, Sequence[str]]) -> None:
        self.agent, self.examples = agent, examples

    @cached_property
    def rollouts(self) -> Rollouts:
        """The agent in action; opened on first use."""
        return self.agent.rollouts(greedy=True)

    def answer(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question."""
        return [trajectory.prediction for trajectory in self.rollouts.run(questions, [0] * len(questions))]


def write(directory: Path, agent: Agent, rows: Sequence[Row], examples: Mapping[str, Sequence[str]]) -> Artifact:
    """Write the agent's model, its passages, examples of questions, and the iterations that led to it."""

    def fill(folder: Path) -> None:
        shutil.copytree(agent.model, folder / MODEL)
        if (documents := documents_of(agent.corpus, agent.retrieve)) is not None:
            write_documents(folder, documents)
        write_json(folder / EXAMPLES, examples)
        write_json(folder / ITERATIONS, list(rows))

    sections = {name: asdict(getattr(agent, name)) for name in ("retrieve", "rollout", "mode")}
    meta = {**sections, "index": index_facts(agent.retrieve.index)}
    return artifacts.write(directory, kind=KIND, method="exsearch", meta=meta, fill=fill)


def load(artifact: Artifact) -> Predictor:
    """Open the agent of an artifact; an ArtifactError if the index that it searches is not there."""
    meta, folder = artifact.meta, artifact.directory
    retrieve, rollout, mode = RetrieveConfig(**meta["retrieve"]), RolloutConfig(**meta["rollout"]), Mode(**meta["mode"])
    retrieve.index = find_index(meta.get("index"), folder)
    agent = Agent(folder / MODEL, StoredCorpus(folder), retrieve, rollout, mode)
    return Predictor(agent, artifact.read_json(EXAMPLES))
