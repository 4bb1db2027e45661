"""How short answers are judged: exact match, F1 and accuracy, each the best over the gold answers.

Texts are compared in the normal form of SQuAD (Rajpurkar et al., EMNLP 2016): lower case, without punctuation and
articles, with single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# In HotpotQA these answer a question as a whole; a partial overlap with one of them means nothing.
CLOSED = frozenset({"yes", "no", "noanswer"})


def normal(text: str) -> str:
    """The normal form of a text; that of a text without words is empty."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction is a gold answer, else 0."""
    return float(normal(prediction) in {normal(gold) for gold in golds})


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The largest harmonic mean of precision and recall of words, from 0 to 1."""
    return max((_f1(normal(prediction), normal(gold)) for gold in golds), default=0.0)


def accuracy(prediction: str, golds: Sequence[str]) -> float:
    """1 if a gold answer is part of the prediction, else 0: long predictions are favoured."""
    answer = normal(prediction)
    return float(any(gold and gold in answer for gold in map(normal, golds)))


def holds(text: str, golds: Sequence[str]) -> bool:
    """Whether a passage has a gold answer, as whole words (as Karpukhin et al., EMNLP 2020, judge retrievers)."""
    padded = f" {normal(text)} "
    return any(gold and f" {gold} " in padded for gold in map(normal, golds))


def is_closed(golds: Sequence[str]) -> bool:
    """Whether the answer is yes or no, so that no passage can be expected to contain it."""
    return any(normal(gold) in CLOSED for gold in golds)


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in CLOSED or gold in CLOSED):
        return 0.0
    predicted, expected = prediction.split(), gold.split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    # Twice the shared words over all words is the harmonic mean of both shares.
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0
