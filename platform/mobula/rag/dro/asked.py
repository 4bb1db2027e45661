"""What every source of real questions shares: selections without a selector, and how answers are measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mobula.alternation import Row
from mobula.evaluation.answers import accuracy, exact_match, f1, is_closed
from mobula.rag.candidates import Asked, Candidates
from mobula.rag.dro.config import EACH, Config
from mobula.rag.dro.source import WEIGHED, Measured, Wording

CUTS = (1, 3, 5, 10, 20)
CHANCE = "chance"  # answer_hit@1 of a passage drawn at random
SUPPORTED = ("hotpotqa",)  # sets that say which passages support an answer
Positions = list[int]


def chosen(candidates: Candidates, asked: Asked, how: str, k: int) -> Positions:
    """Positions of passages, from 0 as they are shown, by one of the selections that need no selector.

    ``gold`` is filled up, and ``no_gold`` is filled, in the retriever's order.
    """
    if how == "none" or not asked.candidates:
        return []
    if how == EACH:
        return list(range(len(asked.candidates)))
    if how == "first":
        return list(range(min(k, len(asked.candidates))))
    ranked = sorted(range(len(asked.ranks)), key=asked.ranks.__getitem__)
    if how == "retriever":
        return ranked[:k]
    gold = candidates.gold(asked)
    first = [row for row in ranked if gold[row] == (how == "gold")]
    rest = [row for row in ranked if gold[row] != (how == "gold")] if how == "gold" else []
    return [*first, *rest][:k]


def labelled(candidates: Candidates, asked: Sequence[Asked], kind: str, k: int, seed: int) -> list[Row]:
    """What a cold start learns from: for a selector supporting passages first, then the retriever's order.

    A generator reads the same passages shuffled, with others drawn at random in the places that are left. Questions
    without a supporting passage among their candidates are left out.
    """
    rows = []
    chance = np.random.default_rng(seed)
    for query, one in enumerate(asked):
        gold = [row for row, is_gold in enumerate(candidates.gold(one)) if is_gold]
        if not gold:
            continue
        order = chosen(candidates, one, "gold", k)
        if kind == "generator":
            kept = [row for row in order if row in gold]
            others = [row for row in range(len(one.candidates)) if row not in gold]
            drawn = chance.permutation(others)[: k - len(kept)].tolist()
            order = chance.permutation([*kept, *drawn]).tolist()
        if len(order) == k:
            rows.append({"query": query, "orders": [order], "weights": [1.0]})
    return rows


def cuts(k: int) -> list[int]:
    """The depths at which a selection of k passages is looked at."""
    return sorted({k, *(cut for cut in CUTS if cut < k)})


def measured(
    candidates: Candidates, asked: Sequence[Asked], orders: Sequence[Positions], predictions: Sequence[str], k: int
) -> Measured:
    """Exact match, F1, accuracy, answer_hit@k, recall of supporting passages and agreement with the retriever.

    A question without candidates has 0 everywhere. answer_hit@k does not apply to answers yes and no, recall not where
    nobody says what supports an answer.
    """
    parts = zip(asked, orders, predictions, strict=True)
    rows = [_one(candidates, one, order, said, k) for one, order, said in parts]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _one(candidates: Candidates, asked: Asked, order: Positions, said: str, k: int) -> dict[str, float]:
    golds = asked.answers
    has = candidates.has_answer(asked)
    hits = [has[row] for row in order]
    closed = is_closed(golds)
    support = {row for row, id in enumerate(asked.candidates) if id in asked.support}
    return {
        "exact": exact_match(said, golds),
        "f1": f1(said, golds),
        "acc": accuracy(said, golds),
        **{f"hit@{cut}": np.nan if closed else float(any(hits[:cut])) for cut in cuts(k)},
        CHANCE: np.nan if closed or not has else float(np.mean(has)),
        "recall": len(support & set(order)) / len(asked.support) if asked.support else np.nan,
        "all_gold": float(set(asked.support) <= {asked.candidates[row] for row in order}) if asked.support else np.nan,
        "tau": _agreement([asked.ranks[row] for row in order]),
    }


def _agreement(ranks: Sequence[int]) -> float:
    """Kendall's tau between an order and the retriever's, of the chosen passages; NaN with fewer than two."""
    pairs = list(combinations(ranks, 2))
    return float(np.mean([1.0 if first < second else -1.0 for first, second in pairs])) if pairs else np.nan


def wording(config: Config, header: str, enumerable: bool) -> Wording:
    """How results of real questions are told."""
    hits = [f"hit@{cut}" for cut in cuts(config.retrieve.choose)]
    measures = {
        "exact": ("exact match, per cent", 100.0),
        "f1": ("F1, per cent", 100.0),
        "acc": ("accuracy, per cent", 100.0),
        **{hit: (f"answer_{hit}, per cent", 100.0) for hit in hits},
        "tau": ("agreement with the retriever's order (tau)", 1.0),
        CHANCE: ("answer_hit@1 by chance, per cent", 100.0),
    }
    if config.data.source in SUPPORTED:
        recall = {"recall": ("supporting passages chosen, per cent", 100.0)}
        measures |= {**recall, "all_gold": ("all supporting passages chosen, per cent", 100.0)}
    followed = {"train_log_p": "log p(y|x), train", "dev_log_p": "log p(y|x), dev"}
    if enumerable:
        measures["log_p"] = ("log p(y|x)", 1.0)
    else:
        followed = {"dev_bound": "estimate of log p(y|x), dev"}
    plotted = {f"dev_{hit}": f"answer_{hit}, dev" for hit in hits} | {"dev_f1": "F1, dev"} | followed
    shown = (*plotted, "dev_em", *WEIGHED)
    return Wording(header, measures, (hits[0], hits[-1]), plotted, shown)
