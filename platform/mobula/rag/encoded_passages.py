"""Questions and their candidates through one frozen encoder: sentence vectors, and tokens beside the answer's spans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mobula.data.pseudo_queries import body
from mobula.models import span_reader
from mobula.models.span_reader import Example
from mobula.rag.candidates import Candidates, Request, open_candidates
from mobula.rag.search import encoder_of


class PassageEncoder:
    """Texts through one frozen encoder: vectors for a pointer, tokens and a table of token vectors for a reader."""

    def __init__(self, candidates: Candidates, encoder: str, most: int) -> None:
        """A passage has at most ``most`` tokens."""
        self.encoder, self.most = encoder_of(encoder), most
        self.candidates = candidates
        self.vectors = torch.from_numpy(candidates.vectors)
        self.texts = span_reader.tokenized(self.encoder, [body(document) for document in candidates.documents], most)
        self._examples: dict[Request, list[Example]] = {}

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
        rows = torch.zeros(len(requests), n, dtype=torch.long)
        for number, request in enumerate(requests):
            count = len(request.candidates)
            ranks[number, :count] = torch.tensor(request.ranks, dtype=torch.long)
            rows[number, :count] = torch.tensor(
                [self.candidates.rows[id] for id in request.candidates], dtype=torch.long
            )
        question = torch.stack([known[text] if text in known else self._questions[text] for text in texts])
        return {"question": question, "passages": self.vectors[rows], "ranks": ranks}

    def example(self, request: Request, position: int) -> Example:
        """A question beside one of its candidates; those of the run's own questions are kept."""
        if request.text not in self._questions:
            return self._beside(request, [position])[0]
        if request not in self._examples:
            self._examples[request] = self._beside(request, range(len(request.candidates)))
        return self._examples[request][position]

    def _beside(self, request: Request, positions: Sequence[int]) -> list[Example]:
        texts = [self.texts[self.candidates.rows[request.candidates[i]]] for i in positions]
        return span_reader.examples(self.encoder, request.text, texts, request.answers)


@lru_cache(maxsize=2)
def open_passages(directory: Path, encoder: str, most: int) -> PassageEncoder:
    """The candidates of a directory, opened once a process."""
    return PassageEncoder(open_candidates(directory), encoder, most)
