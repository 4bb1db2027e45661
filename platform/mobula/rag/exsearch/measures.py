"""Measures of an answered question: the answer, the searches that led to it, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from mobula.cluster.pool import Row
from mobula.data.records import Document
from mobula.evaluation.answers import accuracy, exact_match, f1, holds, is_closed
from mobula.rag.exsearch.data import Problem
from mobula.rag.exsearch.trajectory import Trajectory

SCORES = {"em": exact_match, "f1": f1, "acc": accuracy}
# Titles of shares, whose means over questions are told in per cent; the others are numbers a question.
SHARES = {
    "em": "EM, per cent",
    "f1": "F1",
    "acc": "accuracy",
    "answer_hit": "answer hit",
    "gold_hit": "gold hit",
    "last_gold_hit": "last gold hit",
}
SEARCHES = (
    "failed",
    "searches",
    "under_search",
    "over_search",
    "malformed",
    "forced_final",
    "overflow",
    "repeat_queries",
    "empty_facts",
    "retriever_errors",
)


def measure(problem: Problem, trajectory: Trajectory, document: Callable[[str], Document]) -> Row:
    """The measures of one question; ``failed``: it ended in an error.

    ``answer_hit``: a passage shown for the last sub-query has the answer (null where it is yes or no). ``gold_hit``:
    the share of gold passages that were shown, ``last_gold_hit``: whether the last sub-query showed the last of them.
    ``under_search``: the search ended before all were shown; ``over_search``: it went on after that. All of these are
    null where nobody says which passages are gold.
    """
    golds, shown = problem.answers, trajectory.shown
    last = shown[-1] if shown else []
    row: Row = {name: score(trajectory.prediction, golds) for name, score in SCORES.items()}
    row |= {
        "failed": 0.0 if trajectory.turns else 1.0,
        "answer_hit": None if is_closed(golds) else float(any(holds(_whole(document(id)), golds) for id in last)),
        **_of_gold(problem.support, shown),
        "searches": len(trajectory.queries),
        "in_facts": float(holds(" ".join(trajectory.facts), golds)),
    }
    return row | {name: float(value) for name, value in asdict(trajectory.flags).items()}


def _of_gold(gold: Sequence[str], shown: Sequence[Sequence[str]]) -> Row:
    if not gold:
        return dict.fromkeys(("gold_hit", "last_gold_hit", "under_search", "over_search"))
    support = set(gold)
    seen = [set().union(*shown[: n + 1]) for n in range(len(shown))]
    complete = next((n for n, ids in enumerate(seen) if support <= ids), None)
    return {
        "gold_hit": len(support & seen[-1]) / len(support) if seen else 0.0,
        "last_gold_hit": float(bool(shown) and gold[-1] in shown[-1]),
        "under_search": float(complete is None),
        "over_search": float(complete is not None and complete < len(shown) - 1),
    }


def _whole(document: Document) -> str:
    return f"{document.title} {document.text}"


def means(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The mean of each measure over the questions that have it; a measure that none has is left out."""
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: float(np.mean(values)) for name, values in columns.items() if values}
