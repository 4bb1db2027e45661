"""Every arm of every seed: where it is, how it is trained, and what it does with test questions."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobula import alternation
from mobula.alternation import Outcome, Row, seed_of
from mobula.artifacts import read_jsonl, write_jsonl
from mobula.cluster.pool import pool
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest
from mobula.errors import DataError
from mobula.rag.exsearch.config import ARMS, CLOSED_BOOK, SKILL, WARM, Arm, Config, Mode
from mobula.rag.exsearch.loop import SHARD, Setting, by_query, em_loop, steps_of, weights_of
from mobula.rag.exsearch.sources import corpus_of, problems_of
from mobula.rag.exsearch.start import begun, warmed_up
from mobula.rag.exsearch.training import DATA, MODEL, QueryRows, RowsTask, tune, write_rows
from mobula.rag.exsearch.trajectory import rows
from mobula.rag.exsearch.workers import Agent, SolveWorker, searcher_of
from mobula.threads import one_thread

STEPS = ("think", "search", "record")
FIRST_HOP, LAST_HOP = 0.85, 0.30  # how often a raw question must find the first gold passage, and may find the last
log = logging.getLogger(__name__)


@dataclass
class Comparison:
    """The arms and seeds of an experiment, in a directory. What is finished there is found and not done again."""

    config: Config
    directory: Path
    cluster: ClusterSpec | None = None

    @property
    def first(self) -> str:
        """The arm that the others are compared with, and that is served."""
        return self.config.arms[0]

    @property
    def seeds(self) -> Sequence[int]:
        """The training seeds."""
        return range(self.config.seed, self.config.seed + self.config.evaluation.seeds)

    @property
    def alternating(self) -> list[str]:
        """The arms that alternate."""
        return [name for name in self.config.arms if ARMS[name].learns != "direct"]

    @property
    def off(self) -> dict[str, str]:
        """The first arm with a step that it was trained with switched off: the name, and the step."""
        mode = ARMS[self.first].mode
        return {f"{self.first}, {step} off": step for step in STEPS if getattr(mode, step)}

    @property
    def shuffled(self) -> str:
        """The name of the first arm with what it is shown in another order."""
        return f"{self.first}, passages shuffled"

    @property
    def tested(self) -> list[str]:
        """Everything that answers test questions."""
        before = [WARM] if self.config.model.base else [SKILL, WARM]
        return [*before, *self.config.arms, *self.off, self.shuffled]

    def run(self) -> None:
        """Train every arm of every seed, and only then look at the test questions, once."""
        require_hops(self.config)
        with pool(self.config.parallel if self.config.parallel > 1 else 0, self.cluster) as workers:
            for names in ([WARM], self.config.arms):
                workers.map(self.train, names, self.seeds)
            workers.map(self.solve, self.tested, self.seeds)

    def train(self, name: str, seed: int) -> None:
        """Train one arm of one seed, or its warm-up."""
        with one_thread():
            self.model(name, seed)

    def model(self, name: str, seed: int) -> Path:
        """What was trained under a name; of an arm that alternates, its best iteration by ``alternation.monitor``."""
        if name in (SKILL, WARM):
            return {SKILL: begun, WARM: warmed_up}[name](self.config, self._place(seed), seed, Mode())
        if ARMS[name].learns == "direct":
            return self._direct(name, seed)
        outcome = self.outcome(name, seed)
        return self.setting(name, seed).standing(outcome.history.until(outcome.best))

    def setting(self, name: str, seed: int) -> Setting:
        """An arm that alternates."""
        arm = ARMS[name]
        return Setting(self.config, arm, warmed_up(self.config, self._place(seed), seed, arm.mode), seed)

    def outcome(self, name: str, seed: int) -> Outcome:
        """Its alternation."""

        def progress(row: Row) -> None:
            log.info("%s, seed %d, iteration %d: dev EM %.3f", name, seed, row["iteration"], row["dev_em"])

        loop, place = em_loop(self.setting(name, seed)), self._place(seed) / name
        config = self.config.alternation
        return alternation.run(loop, config, place, seed=seed, cluster=self.cluster, progress=progress)

    def bounds(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """log of the mean likelihood f[S, Q] of dev questions' samples, before the first iteration and at the best."""
        found: list[list[list[float]]] = [[], []]
        for seed in self.seeds:
            outcome, setting = self.outcome(name, seed), self.setting(name, seed)
            for place, iteration in enumerate((0, outcome.best)):
                scores = by_query(outcome.history.until(iteration).rows("held_score"))
                found[place].append([weights_of(setting, mine).log_mean_lik for mine in scores.values()])
        return np.array(found[0]), np.array(found[1])

    def agent(self, name: str, seed: int, split: str) -> tuple[Agent, bool]:
        """Who answers questions of a split under a name, and whether it answers directly."""
        if name in self.off:
            agent, direct = self.agent(self.first, seed, split)
            return replace(agent, mode=replace(agent.mode, **{self.off[name]: False})), direct
        if name == self.shuffled:
            agent, direct = self.agent(self.first, seed, split)
            return replace(agent, shuffled=True), direct
        arm = ARMS.get(name, Arm())
        config = self.config
        corpus = corpus_of(config.data, split)
        agent = Agent(self.model(name, seed), corpus, config.retrieve, config.rollout, arm.mode)
        return agent, arm.learns == "direct"

    def harness(self, name: str) -> str:
        """Names what all that are compared must share: backbone, retriever, limits of rollouts, questions, passages."""
        agent, _ = self.agent(name, self.config.seed, "test")
        shared = [asdict(agent.retrieve), asdict(agent.rollout), asdict(agent.corpus)]
        shared += [asdict(self.config.model), asdict(self.config.data)]
        return digest(shared)[:16]

    def solve(self, name: str, seed: int) -> None:
        """Let what has this name answer the test questions."""
        path = self._answers(name, seed)
        if path.is_file():
            return
        worker = SolveWorker(*self.agent(name, seed, "test"))
        items = [asdict(problem) for problem in problems_of(self.config.data, "test")]
        found: list[Row] = []
        for at in range(0, len(items), SHARD):
            began = time.perf_counter()
            rows_of = worker.process(items[at : at + SHARD], 0)
            seconds = (time.perf_counter() - began) / len(rows_of)
            found += [{**row, "seconds": seconds} for row in rows_of]
        write_jsonl(path, found)

    def solved(self, name: str) -> list[list[Row]]:
        """What :meth:`solve` has found, by seed: a row for every test question."""
        return [read_jsonl(self._answers(name, seed)) for seed in self.seeds]

    def _direct(self, name: str, seed: int) -> Path:
        """A model that answers at once, fine-tuned for as many steps as an arm that alternates."""
        config, place, arm = self.config, self._place(seed) / name, ARMS[name]
        if (place / MODEL).is_dir():
            return place / MODEL
        start = begun(config, self._place(seed), seed, Mode())
        agent = Agent(start, corpus_of(config.data, "train"), config.retrieve, config.rollout, arm.mode)
        problems = problems_of(config.data, "train")
        asked = agent.rollouts(greedy=True).asked([problem.question for problem in problems])
        golds = [[*agent.opened.encode(problem.answers[0]), agent.opened.eos] for problem in problems]
        write_rows(place / DATA, (QueryRows(rows(t, gold, 1.0)) for t, gold in zip(asked, golds, strict=True)))
        steps = config.alternation.iterations * steps_of(config, len(problems))
        tune(RowsTask(start, place / DATA), replace(config.fit, steps=steps), place, seed_of(seed, name), name)
        return place / MODEL

    def _place(self, seed: int) -> Path:
        return self.directory / f"seed-{seed}"

    def _answers(self, name: str, seed: int) -> Path:
        return self.directory / "answers" / f"seed-{seed}" / f"{name}.jsonl".replace(", ", "-").replace(" ", "-")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("config", "directory", "cluster")}


def require_search(config: Config, exact: np.ndarray) -> None:
    """Check that questions of the world are not known by heart: ``exact`` matches f[S, Q] without searching are few.

    Raises:
        DataError: otherwise: what searching adds would prove nothing.
    """
    found = float(exact.mean())
    if config.data.source == "world" and config.evaluation.decisive and found > CLOSED_BOOK:
        raise DataError(
            f"data: closed_book answers {found:.2f} of the test questions without searching (at most {CLOSED_BOOK}); "
            "use other data.seed or more data.people, data.firms and data.books"
        )


def require_hops(config: Config) -> None:
    """Check on dev questions of the world that a raw question finds its first passage, and not its last.

    Raises:
        DataError: otherwise: a search more would prove nothing.
    """
    if config.data.source != "world":
        return
    problems = problems_of(config.data, "dev")
    searcher = searcher_of(corpus_of(config.data, "dev"), config.retrieve.kind, config.retrieve.encoder)
    lists = searcher.search([problem.question for problem in problems], config.rollout.k_show)
    found = [{hit.id for hit in hits} for hits in lists]
    first = np.mean([p.support[0] in ids for p, ids in zip(problems, found, strict=True)])
    deep = [p.support[-1] in ids for p, ids in zip(problems, found, strict=True) if len(p.support) > 1]
    if first < FIRST_HOP or (deep and np.mean(deep) > LAST_HOP):
        raise DataError(
            f"data: raw questions find their first passage in {first:.2f} of cases (at least {FIRST_HOP} wanted) and "
            f"their last in {np.mean(deep):.2f} (at most {LAST_HOP}); use retrieve.kind=bm25 and fewer rollout.k_show"
        )
