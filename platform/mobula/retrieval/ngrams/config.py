"""The ``ngram`` section of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import key

# What a view's stream holds, and the text that asks the language model for it. A single view needs no marker.
MARKERS = {"text": "", "title": "|| title", "body": "|| body", "query": "|| query"}
MULTIVIEW = ("title", "body", "query")


@dataclass
class NgramConfig:
    """N-gram retrieval: what is generated, how keys are weighted, and what the language model is trained on.

    ``views=[text]`` is plain n-gram retrieval over title and body, ``[title, body, query]`` its multiview form.
    """

    views: list[str] = key(["text"], "streams that keys are generated for; scores add up", choices=tuple(MARKERS))
    max_len: int = key(6, "most tokens of a key", ge=1, le=32)
    beam: int = key(15, "beam width", ge=1, le=256)
    alpha: float = key(2.0, "exponent of a key's weight", gt=0, le=10)
    beta: float = key(0.8, "share of a key's weight that only tokens not yet covered earn", ge=0, le=1)
    rare: int = key(1500, "most occurrences of a key that proposes documents", ge=1)
    candidates: int = key(1500, "proposed documents that are scored in full", ge=1)
    unigrams: int = key(5000, "most probable first tokens that become keys of one token", ge=0)
    most_frequent: int | None = key(None, "keys use only this many most frequent tokens; null: all", ge=1)
    spans: int = key(10, "windows of its document that a training query is paired with", ge=1, le=1000)
    titles: int = key(3, "further times that it is paired with the title", ge=0, le=1000)
    query_spans: int = key(5, "windows of its document's pseudo-queries, in the view `query`", ge=1, le=1000)
    sharpness: float = key(1.0, "how strongly windows that share rare tokens with the query are preferred", ge=0)
    unseen: int = key(
        0, "further tokens in the softmax of a training step, drawn from those of no initial document", ge=0
    )
    pseudo_queries: int = key(10, "pseudo-queries of a document in the view `query`", ge=1, le=1000)
    together: int = key(16, "queries that share network calls; fewer are padded to as many", ge=1, le=256)
    dev_queries: int = key(60, "dev queries searched while training", ge=1)

    def problems(self) -> list[str]:
        """Contradictions between keys of this section."""
        if not self.views or len(set(self.views)) < len(self.views):
            return [f"views={self.views}: expected one or more different views"]
        if "text" in self.views and len(self.views) > 1:
            return [f"views={self.views}: text holds title and body, so it stands alone"]
        return []
