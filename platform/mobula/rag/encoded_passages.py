"""Questions and their candidates through one frozen encoder: sentence vectors, and tokens beside the answer's spans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mobula.data.pseudo_queries import body
from mobula.models import span_reader
from mobula.models.span_reader import Example, TokenizedText
from mobula.rag.candidates import Candidates, Request
from mobula.rag.search import encoder_of

KEPT = 20_000  # passages beyond the candidates' own that are kept encoded


class PassageEncoder:
    """Texts through one frozen encoder: vectors for a pointer, tokens and a table of token vectors for a reader.

    Passages that only the candidates' searcher has are encoded when they are first met.
    """

    def __init__(self, candidates: Candidates, encoder: str, most: int) -> None:
        """A passage has at most ``most`` tokens."""
        self.encoder, self.most = encoder_of(encoder), most
        self.candidates = candidates
        self.vectors = torch.from_numpy(candidates.vectors)
        self.texts = span_reader.tokenized(self.encoder, [body(document) for document in candidates.documents], most)
        self._examples: dict[Request, list[Example]] = {}
        self._others: dict[str, tuple[Tensor, TokenizedText]] = {}

    @cached_property
    def table(self) -> Tensor:
        """The frozen vectors of tokens f32[V, dim]."""
        module = self.encoder.module
        embedding = module if isinstance(module, torch.nn.Embedding) else module.get_input_embeddings()  # type: ignore[operator]
        return embedding.weight.detach().float().clone()  # type: ignore[union-attr]

    @cached_property
    def _questions(self) -> dict[str, Tensor]:
        """The vectors of the run's questions, by text: a split is embedded together, once."""
        vectors: dict[str, Tensor] = {}
        for requests in self.candidates.splits.values():
            texts = [request.text for request in requests]
            vectors.update(zip(texts, torch.from_numpy(self.encoder.embed(texts)), strict=True))
        return vectors

    def features(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Vectors of questions f[B, D] and passages f[B, n, D], ranks i64[B, n], 0 where there is no passage."""
        texts = [request.text for request in requests]
        new = [text for text in dict.fromkeys(texts) if text not in self._questions]
        known = dict(zip(new, torch.from_numpy(self.encoder.embed(new)), strict=True)) if new else {}
        n = max(len(request.candidates) for request in requests)
        ranks = torch.zeros(len(requests), n, dtype=torch.long)
        passages = torch.zeros(len(requests), n, self.encoder.dim)
        for number, request in enumerate(requests):
            count = len(request.candidates)
            ranks[number, :count] = torch.tensor(request.ranks, dtype=torch.long)
            passages[number, :count] = self._vectors(request.candidates)
        question = torch.stack([known[text] if text in known else self._questions[text] for text in texts])
        return {"question": question, "passages": passages, "ranks": ranks}

    def example(self, request: Request, position: int) -> Example:
        """A question beside one of its candidates; those of the run's own questions are kept."""
        if request.text not in self._questions:
            return self._beside(request, [position])[0]
        if request not in self._examples:
            self._examples[request] = self._beside(request, range(len(request.candidates)))
        return self._examples[request][position]

    def _beside(self, request: Request, positions: Sequence[int]) -> list[Example]:
        self._encode(request.candidates)
        rows, ids = self.candidates.rows, [request.candidates[i] for i in positions]
        texts = [self.texts[rows[id]] if id in rows else self._others[id][1] for id in ids]
        return span_reader.examples(self.encoder, request.text, texts, request.answers)

    def _vectors(self, ids: Sequence[str]) -> Tensor:
        """f32[n, D] of passages."""
        rows = self.candidates.rows
        if all(id in rows for id in ids):
            return self.vectors[torch.tensor([rows[id] for id in ids], dtype=torch.long)]
        self._encode(ids)
        return torch.stack([self.vectors[rows[id]] if id in rows else self._others[id][0] for id in ids])

    def _encode(self, ids: Sequence[str]) -> None:
        """Have those of the passages that only the searcher has."""
        if len(self._others) > KEPT:
            self._others.clear()
        new = [id for id in ids if id not in self.candidates.rows and id not in self._others]
        if new:
            bodies = [body(self.candidates.document(id)) for id in new]
            vectors = torch.from_numpy(self.encoder.embed(bodies))
            encoded = zip(vectors, span_reader.tokenized(self.encoder, bodies, self.most), strict=True)
            self._others.update(zip(new, encoded, strict=True))


@lru_cache(maxsize=2)
def open_passages(candidates: Candidates, encoder: str, most: int) -> PassageEncoder:
    """The passages of opened candidates, encoded once a process."""
    return PassageEncoder(candidates, encoder, most)
