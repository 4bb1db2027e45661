"""Two retrievers fused by their ranked lists, the weight chosen on dev."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobula.config import key
from mobula.data.records import Document, Query
from mobula.evaluation.ranking import per_query
from mobula.retrieval.search import Hit, Retriever, SearchOptions, SearchResult

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURE = "MRR@10"
RRF = 60  # added to a rank before it is inverted (Cormack et al. 2009)


@dataclass
class FusionConfig:
    """How two ranked lists, the first by numeric docids, are joined."""

    weight: float | None = key(None, "weight of the numeric list; null: chosen on dev", ge=0, le=1)
    rule: str = key("zscore", "what is added: standardised scores, or 1/(60 + rank)", choices=("zscore", "rrf"))


@dataclass(eq=False)
class HybridRetriever:
    """Two retrievers by ``w * s(numeric) + (1 - w) * s(text)``.

    s standardises the scores of a list over its generated hits, or is 1/(60 + rank); a document that one list lacks
    gets that list's least. ``options`` are those of the first part.
    """

    name: str
    parts: tuple[Retriever, ...]
    options: SearchOptions
    weight: float
    rule: str = "zscore"
    decoders: tuple[str, ...] = ()

    def __copy__(self) -> HybridRetriever:
        return replace(self, parts=tuple(map(copy.copy, self.parts)))

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`.Retriever`; exactly min(k, N) hits."""
        numeric = self.parts[0].search(queries, [replace(self.options, k=one.k) for one in options])
        if self.weight == 1:
            return numeric
        text = self.parts[1].search(queries, options)
        lists = zip(numeric, text, options, strict=True)
        return [fuse(a, b, self.weight, one.k, self.rule) for a, b, one in lists]

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents to both parts."""
        return [part.insert(documents) for part in self.parts][-1]

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents from both parts."""
        return [part.remove(doc_ids) for part in self.parts][-1]

    def restricted(self, doc_ids: Sequence[str]) -> HybridRetriever:
        """The fusion of both parts over some of the documents (diagnostic)."""
        return replace(self, parts=tuple(part.restricted(doc_ids) for part in self.parts))  # type: ignore[attr-defined]


def fuse(numeric: SearchResult, text: SearchResult, weight: float, k: int, rule: str = "zscore") -> SearchResult:
    """The first k documents of both lists by the weighted sum of what the rule makes of their scores."""
    scores = [RULES[rule](result) for result in (numeric, text)]
    least = [min(of_list.values(), default=0.0) for of_list in scores]
    total: dict[str, float] = {}
    for doc_id in dict.fromkeys(hit.doc_id for hit in [*numeric.hits, *text.hits]):
        left, right = (of_list.get(doc_id, lowest) for of_list, lowest in zip(scores, least, strict=True))
        total[doc_id] = weight * left + (1 - weight) * right
    order = sorted(total, key=lambda doc_id: -total[doc_id])[:k]
    hits = [Hit(doc_id, total[doc_id]) for doc_id in order]
    return SearchResult(hits, nfe=numeric.nfe + text.nfe, rows=numeric.rows + text.rows, scored_by="fusion")


def tune_weight(parts: tuple[Retriever, ...], options: SearchOptions, dev: Sequence[Query], rule: str) -> float:
    """The weight out of :data:`WEIGHTS` with the best MRR@10 on dev."""
    texts = [query.text for query in dev]
    numeric = parts[0].search(texts, [options] * len(dev))
    text = parts[1].search(texts, [SearchOptions(k=options.k)] * len(dev))

    def value(weight: float) -> float:
        hits = [fuse(a, b, weight, options.k, rule).hits for a, b in zip(numeric, text, strict=True)]
        return float(np.mean(per_query(hits, dev, documents=1 << 31, measures=[MEASURE], width=10)[MEASURE]))

    return max(WEIGHTS, key=value)


def _generated(result: SearchResult) -> list[Hit]:
    return result.hits[: len(result.hits) - result.filled]


def _standardised(result: SearchResult) -> dict[str, float]:
    hits = _generated(result)
    scores = np.array([hit.score for hit in hits] or [0.0])
    standardised = (scores - scores.mean()) / (scores.std() or 1.0)
    return {hit.doc_id: float(score) for hit, score in zip(hits, standardised, strict=False)}


def _reciprocal(result: SearchResult) -> dict[str, float]:
    return {hit.doc_id: 1 / (RRF + rank) for rank, hit in enumerate(_generated(result), 1)}


RULES = {"zscore": _standardised, "rrf": _reciprocal}
