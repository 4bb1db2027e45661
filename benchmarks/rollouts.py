"""Questions per second of an agent that searches: many in flight against one at a time; and its retriever's time.

The agent is trained here, just enough to search: what it writes decides how long its chats are. Both arms answer the
same questions greedily with the same model, taking turns; the ratio is that of paired rounds. The retriever is asked
sub-queries over 5,000 passages that it has not seen before, 32 at a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ratio
from mobula import config as configs
from mobula.data.records import Document
from mobula.data.worlds.words import Size, World
from mobula.rag.exsearch.agent import Agent
from mobula.rag.exsearch.config import Config, Mode
from mobula.rag.exsearch.data import corpus_of, problems_of
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.exsearch.warm_up import warm_up_model
from mobula.rag.search import open_searcher
from mobula.threads import one_thread

CONFIG: dict[str, Any] = {
    "method": "exsearch",
    "name": "rollouts",
    "data": {"warm_up": 60, "dev": 192},
    "skill": {"steps": 250},
    "skill_questions": 1200,
    "warm_up": {"steps": 100},
}
ROUNDS, ALONE = 7, 16  # paired rounds; questions of a round that are asked one at a time
WORLDS = 2
LARGE = Size(people=2400, towns=60, firms=40, books=60)
BATCH, BATCHES, K = 32, 60, 3


def run() -> dict[str, Any]:
    """Questions per second of both arms, their ratio, and milliseconds of a search for 32 sub-queries."""
    config = configs.build(Config, CONFIG)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        model = warm_up_model(config, Path(folder), 0, Mode())
        agent = Agent(model, corpus_of(config.data, "dev"), config.retrieve, config.rollout, Mode())
        rollouts = agent.rollouts(greedy=True)
        questions = [problem.question for problem in problems_of(config.data, "dev")]
        together, alone = _rounds(rollouts, questions)
        searches = [len(trajectory.queries) for trajectory in rollouts.run(questions, [0] * len(questions))]
        times, passages = _searching()
    per_second = {"batched_qps": together, "single_qps": alone}
    return {
        "name": "rollouts",
        "ratios": {"batched_over_single_qps": ratio(together, alone)},
        "arms": {name: round(float(np.median(values)), 2) for name, values in per_second.items()},
        "retrieval_ms": {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 95)},
        "conditions": {
            "questions": len(questions),
            "one_at_a_time": ALONE,
            "rounds": ROUNDS,
            "searches_per_question": round(float(np.mean(searches)), 2),
            "in_flight": config.rollout.batch,
            "retrieval": f"bm25, {passages} passages, {BATCH} queries, k={K}, none asked twice",
            "threads": 1,
        },
    }


def _rounds(rollouts: Rollouts, questions: Sequence[str]) -> tuple[list[float], list[float]]:
    """Questions per second, in turn: all in flight, and some one at a time. The first round is not counted."""
    single = Rollouts(rollouts.model, rollouts.searcher, replace(rollouts.config, batch=1), rollouts.mode, greedy=True)
    together, alone = [], []
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        rollouts.run(questions, [0] * len(questions))
        middle = time.perf_counter()
        start = number * ALONE % len(questions)
        chosen = questions[start : start + ALONE]
        for question in chosen:
            single.run([question], [0])
        ended = time.perf_counter()
        together.append(len(questions) / (middle - began))
        alone.append(len(chosen) / (ended - middle))
    return together[1:], alone[1:]


def _searching() -> tuple[list[float], int]:
    """Milliseconds of every batch of searches, and the number of passages."""
    worlds = [World(seed, LARGE) for seed in range(WORLDS)]
    documents = [
        Document(f"{world.seed}-{document.id}", document.title, document.text)
        for world in worlds
        for document in world.documents
    ]
    searcher = open_searcher(documents, "bm25")
    questions = worlds[0].questions((BATCHES + 1) * BATCH, "timed", held_out=True)
    queries = list(dict.fromkeys(hop.query for question in questions for hop in question.plan))
    times = []
    for start in range(0, (BATCHES + 1) * BATCH, BATCH):
        began = time.perf_counter()
        searcher.search(queries[start : start + BATCH], K)
        times.append(1000 * (time.perf_counter() - began))
    return times[1:], len(documents)
