"""Selections of a question's candidates: by rules that need no selector, by labels, and their measures.

A permutation is a list of positions, from 0, among the candidates of a question as they are shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mobula.evaluation.answers import accuracy, exact_match, f1, is_closed
from mobula.rag.candidates import Candidates, Request

Row = dict[str, Any]
Permutation = list[int]
# Who selects: a selector, or a rule: the retriever's best, those shown first, those that support the answer, others,
# each candidate as a permutation of its own, or none at all.
SELECTIONS = ("selector", "retriever", "first", "gold", "no_gold", "each", "none")
CUTS = (1, 3, 5, 10, 20)
RANDOM_HIT = "random_hit@1"  # answer_hit@1 of a passage drawn at random


def selected(candidates: Candidates, request: Request, how: str, k: int) -> Permutation:
    """Passages by one of the :data:`SELECTIONS` that need no selector.

    ``gold`` is filled up, and ``no_gold`` is filled, in the retriever's order.
    """
    if how == "none" or not request.candidates:
        return []
    if how == "each":
        return list(range(len(request.candidates)))
    if how == "first":
        return list(range(min(k, len(request.candidates))))
    ranked = sorted(range(len(request.ranks)), key=request.ranks.__getitem__)
    if how == "retriever":
        return ranked[:k]
    gold = candidates.gold(request)
    first = [i for i in ranked if gold[i] == (how == "gold")]
    rest = [i for i in ranked if not gold[i]] if how == "gold" else []
    return [*first, *rest][:k]


def labelled(candidates: Candidates, requests: Sequence[Request], kind: str, k: int, seed: int) -> list[Row]:
    """Rows ``{query, permutations, weights}`` of a cold start: a selector's are supporting passages, then by rank.

    A generator reads the same passages shuffled, with others drawn at random in the positions that are left. Questions
    without a supporting passage among their candidates are left out.
    """
    rows: list[Row] = []
    rng = np.random.default_rng(seed)
    for query, request in enumerate(requests):
        gold = [i for i, is_gold in enumerate(candidates.gold(request)) if is_gold]
        if not gold:
            continue
        permutation = selected(candidates, request, "gold", k)
        if kind == "generator":
            kept = [i for i in permutation if i in gold]
            others = [i for i in range(len(request.candidates)) if i not in gold]
            permutation = rng.permutation([*kept, *rng.permutation(others)[: k - len(kept)].tolist()]).tolist()
        if len(permutation) == k:
            rows.append({"query": query, "permutations": [permutation], "weights": [1.0]})
    return rows


def cuts(k: int) -> list[int]:
    """The depths at which a selection of k passages is looked at."""
    return sorted({k, *(cut for cut in CUTS if cut < k)})


def measured(candidates: Candidates, request: Request, permutation: Permutation, answer: str, k: int) -> Row:
    """Exact match, F1, accuracy, answer_hit@k, recall of supporting passages and agreement with the retriever.

    A question without candidates has 0 everywhere. None where a measure does not apply: answer_hit@k to answers yes and
    no, recall where nobody says what supports an answer.
    """
    golds, support = request.answers, set(request.support)
    holding = candidates.has_answer(request)
    hits = [holding[i] for i in permutation]
    chosen = {request.candidates[i] for i in permutation}
    closed = is_closed(golds)
    return {
        "exact": exact_match(answer, golds),
        "f1": f1(answer, golds),
        "acc": accuracy(answer, golds),
        **{f"hit@{cut}": None if closed else float(any(hits[:cut])) for cut in cuts(k)},
        RANDOM_HIT: None if closed or not holding else float(np.mean(holding)),
        "recall": len(support & chosen) / len(support) if support else None,
        "all_gold": float(support <= chosen) if support else None,
        "tau": _agreement([request.ranks[i] for i in permutation]),
    }


def _agreement(ranks: Sequence[int]) -> float | None:
    """Kendall's tau between a permutation and the retriever's order of its passages; None with fewer than two."""
    pairs = list(itertools.combinations(ranks, 2))
    return float(np.mean([1.0 if first < second else -1.0 for first, second in pairs])) if pairs else None
