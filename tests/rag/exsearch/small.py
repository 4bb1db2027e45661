"""A small world for tests: its config, and a model that says what a script tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobula.artifacts import read_jsonl
from mobula.config import build
from mobula.models.causal import CausalModel
from mobula.models.finetune import TokenRow, finetune
from mobula.models.language_model import Continuation, Sampling
from mobula.rag.em import SampleWorker
from mobula.rag.exsearch import artifact
from mobula.rag.exsearch.agent import Agent
from mobula.rag.exsearch.config import Config, Mode, RetrieveConfig
from mobula.rag.exsearch.data import Problem, corpus_of, problems_of
from mobula.rag.exsearch.exsearch import Trajectories
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.exsearch.warm_up import fresh, oracle_of
from mobula.rag.search import Retrying, Searcher
from mobula.rag.searchers import open_corpus
from mobula.rag.weighted_rows import QueryRows, RowsTask, write_rows
from mobula.training import TrainingConfig

CONFIG: dict[str, Any] = {
    "method": "exsearch",
    "name": "small",
    "arms": ["exsearch"],
    "data": {"people": 60, "towns": 30, "firms": 12, "books": 16, "warm_up": 20, "train": 16, "dev": 12, "test": 14},
    "model": {"width": 32},
    "skill": {"steps": 20, "workers": 0},
    "skill_questions": 80,
    "warm_up": {"steps": 10, "workers": 0},
    "fit": {"batch": 4, "workers": 0},
    "alternation": {"iterations": 2, "actors": 0, "monitor": "dev_em"},
    "evaluation": {"decisive": False, "resamples": 200},
}
Say = Callable[[str], str]


def read_rows(path: Path) -> list[QueryRows]:
    """What :func:`write_rows` wrote."""
    return [QueryRows([TokenRow(**row) for row in line["rows"]], line["before"]) for line in read_jsonl(path)]


def config(**changes: Any) -> Config:
    """The config, sections merged with changes."""
    values = {
        name: {**value, **changes.pop(name, {})} if isinstance(value, dict) else value for name, value in CONFIG.items()
    }
    return build(Config, {**values, **changes})


class Scripted(CausalModel):
    """A model whose continuations are a function of the prompt's text; every token has log p = -0.5."""

    say: Say

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        batch: int = 64,
        memory: list[Any] | None = None,
    ) -> list[Continuation]:
        """What the script says, cut to the tokens that are allowed."""
        found = []
        for prompt in prompts:
            ids = self.encode(self.say(self.decode(prompt)))
            ended = len(ids) < sampling.max_tokens
            ids = ids[: sampling.max_tokens]
            scores = (-0.5,) * (len(ids) + ended)
            found.append(Continuation(tuple(ids), scores, scores, ended))
        return found


def scripted(say: Say) -> Scripted:
    """A model with the world's words."""
    model = fresh(config(), 0)
    made = Scripted(model.network, model.tokenizer, "scripted")
    made.say = say
    return made


def rollouts(
    say: Say, searcher: Searcher | None = None, mode: Mode | None = None, retries: int = 0, **limits: Any
) -> Rollouts:
    """Rollouts of a scripted agent over the passages of train questions."""
    made = config(rollout=limits) if limits else config()
    index = searcher or open_corpus(corpus_of(made.data, "train"), RetrieveConfig())
    return Rollouts(scripted(say), Retrying(index, 5, retries, 0.0), made.rollout, mode or Mode(), greedy=True)


def problems(split: str = "train", hops: int = 0) -> list[Problem]:
    """The questions of a split, those of one number of hops if it is given."""
    found = problems_of(config().data, split)
    return [problem for problem in found if not hops or len(problem.plan) == hops]


def known() -> list[Problem]:
    """The questions that the agent of :func:`trained` knows: one of each number of hops."""
    return [problems("dev", hops)[0] for hops in (1, 2, 3)]


def trained(root: Path) -> Path:
    """The artifact of an agent that was trained on a few questions for long."""
    made = config()
    fresh(made, 0).save(root / "fresh")
    model = CausalModel.open(str(root / "fresh"))
    corpus = corpus_of(made.data, "dev")
    write_rows(root / "rows.jsonl", oracle_of(made, model, corpus, Mode()).rows(known(), 0))
    training = TrainingConfig(steps=120, batch=3, lr=8e-3, workers=0)
    finetune(RowsTask(root / "fresh", root / "rows.jsonl"), training, root, seed=0, name="known", cluster=None)
    agent = Agent(root / "model", corpus, made.retrieve, made.rollout, Mode())
    examples = {problem.kind: [problem.question] for problem in known()}
    return artifact.write(root / "artifact", agent, [], examples).directory


def sampler(agent: Agent, samples: int = 2, seed: int = 7) -> SampleWorker:
    """Samples trajectories of an agent."""
    return SampleWorker(Trajectories(agent, samples), seed)


def untrained(path: Path) -> Agent:
    """An agent that has learned nothing, among the passages of train questions."""
    values = config()
    fresh(values, 0).save(path)
    return Agent(path, corpus_of(values.data, "train"), values.retrieve, values.rollout, Mode())
