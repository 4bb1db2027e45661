"""What a question finds of the passages that answer it, and what an oracle's sub-queries find: by hop, no training.

Over HotpotQA and 2WikiMultihopQA (their sub-queries are the titles of supporting paragraphs, which flatters them) and
MuSiQue (the sub-questions of its annotators, earlier answers filled in). ``python -m benchmarks.hops``; needs
MOBULA_DATA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mobula.data.multihop import hotpotqa_100, musique, two_wiki
from mobula.data.questions import Question, hotpotqa
from mobula.rag.search import KINDS, Searcher, open_searcher

SETS = {"hotpotqa": hotpotqa, "hotpotqa_100": hotpotqa_100, "2wiki": two_wiki, "musique": musique}
DEPTHS = (1, 3, 5, 20)
HOPS = 4


def run() -> dict[str, Any]:
    """Shares of gold passages among the first k, by set, retriever, k and hop: from the question, and by sub-query."""
    found: dict[str, Any] = {"name": "hops", "hits": {}, "conditions": {}}
    for name, load in SETS.items():
        questions, documents = load()
        found["conditions"][name] = {"questions": len(questions), "passages": len(documents)}
        for kind in KINDS:
            searcher = open_searcher(documents, kind)
            found["hits"][f"{name}, {kind}"] = {f"k={k}": _hits(searcher, questions, k) for k in DEPTHS}
    return found


def _hits(searcher: Searcher, questions: Sequence[Question], k: int) -> list[dict[str, float]]:
    """By hop: how often its gold passage is found from the question, and from its own sub-query."""
    whole = [{hit.id for hit in hits} for hits in searcher.search([question.text for question in questions], k)]
    table = []
    for hop in range(HOPS):
        rows = [row for row, question in enumerate(questions) if len(question.support) > hop]
        if not rows:
            break
        golds = [questions[row].support[hop] for row in rows]
        steps = [questions[row].steps[hop][0] if questions[row].steps else golds[i] for i, row in enumerate(rows)]
        parts = [{hit.id for hit in hits} for hits in searcher.search(steps, k)]
        raw = np.mean([gold in whole[row] for gold, row in zip(golds, rows, strict=True)])
        own = np.mean([gold in ids for gold, ids in zip(golds, parts, strict=True)])
        table.append({"question": round(float(raw), 3), "sub_query": round(float(own), 3), "n": len(rows)})
    return table


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
