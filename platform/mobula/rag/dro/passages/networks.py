"""Pointer and reader at work on questions with their candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mobula.alternation import Row as Record
from mobula.data.records import Document
from mobula.evaluation.answers import exact_match, f1
from mobula.rag.candidates import Asked
from mobula.rag.dro.asked import Positions, chosen, measured
from mobula.rag.dro.config import Config, ModelConfig
from mobula.rag.dro.passages.book import Book, Encoded
from mobula.rag.dro.passages.pages import Row, batched
from mobula.rag.dro.passages.pointer import Pointer, PointerShape, uniforms
from mobula.rag.dro.passages.reader import CLOSED, FLOOR, OTHERS, SPAN, Reader, ReaderShape, log_likelihood, masses
from mobula.rag.dro.source import Judged, Measured
from mobula.rag.exact import log_marginal
from mobula.rag.search import encoder_of
from mobula.training import load_weights

BATCH = 64
MASSES = ("gold", "whole")


@dataclass(frozen=True)
class Read:
    """What the reader makes of a passage: the masses of gold and of all spans, its best span and that one's score."""

    gold: float
    whole: float
    best: float
    text: str


@torch.inference_mode()
def read(reader: Reader, rows: Sequence[Row]) -> list[Read]:
    """What the reader makes of questions beside pages."""
    found: list[Read] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = batched(part)
        spans, closed = reader(batch["question"], batch["passage"])
        gold, whole = masses(spans, closed, batch["gold"], batch["gold_closed"])
        best, place = torch.cat([spans.flatten(1), closed], 1).max(1)
        count = spans.shape[1] * SPAN  # yes and no are counted behind them
        columns = (part, gold.tolist(), whole.tolist(), best.tolist(), place.tolist())
        for row, right, all_spans, score, at in zip(*columns, strict=True):
            text = CLOSED[at - count] if at >= count else row.page.span(at // SPAN, at % SPAN)
            found.append(Read(right, all_spans, score, text))
    return found


@torch.inference_mode()
def select(pointer: Pointer, features: dict[str, Tensor], uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :meth:`Pointer.draw`."""
    return pointer.draw(features["question"], features["passages"], features["ranks"], uniform)


def answer(reader: Reader, passages: Sequence[Read]) -> str:
    """The likeliest span of passages in their order; nothing without passages."""
    if not passages:
        return ""
    scores = [one.best + rank for one, rank in zip(passages, reader.rank.tolist(), strict=False)]
    return passages[int(np.argmax(scores))].text


@dataclass(frozen=True)
class PassageNetworks:
    """As :class:`mobula.rag.dro.source.Networks`. ``orders``: every order i64[Z, K], where they can be listed."""

    book: Book
    pointer: Pointer
    reader: Reader
    k: int
    orders: Tensor | None

    def sample(self, split: str, queries: Sequence[int], samples: int, seeds: Sequence[int]) -> list[Record]:
        """Each question draws with its own numbers."""
        rows: list[Record] = []
        for start in range(0, len(queries), BATCH):
            part = slice(start, start + BATCH)
            numbers = uniforms(seeds[part], samples, self.k)
            orders, _ = select(self.pointer, self.book.features(split, queries[part]), numbers)
            rows += [{"orders": found} for found in orders.tolist()]
        return rows

    def choose(self, split: str, queries: Sequence[int], how: str) -> list[Positions]:
        """The selector's are greedy; a question without candidates has none."""
        asked = self.book.asked(split, queries)
        if how != "selector":
            return [chosen(self.book.candidates, one, how, self.k) for one in asked]
        found: dict[int, Positions] = {query: [] for query in queries}
        there = [query for query, one in zip(queries, asked, strict=True) if one.candidates]
        for start in range(0, len(there), BATCH):
            part = there[start : start + BATCH]
            orders, _ = select(self.pointer, self.book.features(split, part), None)
            found.update(zip(part, orders[:, 0].tolist(), strict=True))
        return [found[query] for query in queries]

    def judge(self, split: str, queries: Sequence[int], orders: Sequence[Sequence[Positions]]) -> list[Judged]:
        """Every passage that an order names is read once."""
        pages = self._read(split, queries, orders)
        asked = self.book.asked(split, queries)
        return [self._judged(*parts) for parts in zip(asked, pages, orders, strict=True)]

    def measure(self, split: str, queries: Sequence[int], how: str) -> Measured:
        """Greedy; and log p(y|x) where orders can be listed, the floor for a question without candidates."""
        orders, asked = self.choose(split, queries, how), self.book.asked(split, queries)
        pages = self._read(split, queries, [[order] for order in orders])
        said = [answer(self.reader, [one[z] for z in order]) for one, order in zip(pages, orders, strict=True)]
        found = measured(self.book.candidates, asked, orders, said, self.k)
        if self.orders is not None:
            there = [row for row, one in enumerate(asked) if one.candidates]
            found["log_p"] = np.full(len(asked), np.log(FLOOR / OTHERS))
            found["log_p"][there] = log_marginal(*self.exact(split, [queries[row] for row in there])).numpy()
        return found

    def exact(self, split: str, queries: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of all orders."""
        assert self.orders is not None
        whole = self.orders.tolist()
        log_lik = [one.log_lik for one in self.judge(split, queries, [whole] * len(queries))]
        prior = [self._log_prior(split, queries[at : at + BATCH]) for at in range(0, len(queries), BATCH)]
        return torch.cat(prior).double(), torch.tensor(log_lik, dtype=torch.float64)

    @torch.inference_mode()
    def _log_prior(self, split: str, queries: Sequence[int]) -> Tensor:
        features = self.book.features(split, queries)
        assert self.orders is not None
        orders = self.orders.expand(len(queries), -1, -1)
        return self.pointer(features["question"], features["passages"], features["ranks"], orders).sum(-1)

    @torch.inference_mode()
    def _judged(self, asked: Asked, pages: Mapping[int, Read], orders: Sequence[Positions]) -> Judged:
        rank = self.reader.rank.double()
        parts = [torch.tensor([[getattr(pages[z], name) for z in order] for order in orders]) for name in MASSES]
        gold, whole = (part.double() for part in parts)
        said = [answer(self.reader, [pages[z] for z in order]) for order in orders]
        scores = {text: (exact_match(text, asked.answers), f1(text, asked.answers)) for text in set(said)}
        right, reward = zip(*(scores[text] for text in said), strict=True)
        return Judged(log_likelihood(gold, whole, rank[: gold.shape[1]]).tolist(), list(right), list(reward))

    def _read(self, split: str, queries: Sequence[int], orders: Sequence[Sequence[Positions]]) -> list[dict[int, Read]]:
        """By question and position, what the reader makes of the passages that orders name."""
        named = [sorted({z for order in found for z in order}) for found in orders]
        known = [(at, z) for at, places in enumerate(named) for z in places]
        rows = [self.book.row(split, queries[at], z) for at, z in known]
        found: list[dict[int, Read]] = [{} for _ in queries]
        for (at, z), one in zip(known, read(self.reader, rows), strict=True):
            found[at][z] = one
        return found


def network(
    kind: str, model: ModelConfig, choose: int, encoded: Encoded, start: Path | None, seed: int = 0
) -> Pointer | Reader:
    """A pointer or a reader with the weights of a file, or fresh ones of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Pointer | Reader = BUILD[kind](model, choose, encoded)
    if start is not None:
        load_weights(made, start)
    return made


def _pointer(model: ModelConfig, choose: int, encoded: Encoded) -> Pointer:
    return Pointer(PointerShape(encoded.encoder.dim, model.layers, model.selector_width, model.heads, choose))


def _reader(model: ModelConfig, choose: int, encoded: Encoded) -> Reader:
    dim = encoded.table.shape[1]
    shape = ReaderShape(dim, model.layers, model.generator_width, model.heads, model.passage_tokens, choose)
    return Reader(shape, encoded.table)


BUILD: dict[str, Callable[[ModelConfig, int, Encoded], Pointer | Reader]] = {"selector": _pointer, "generator": _reader}


@dataclass(frozen=True)
class PassageChooser:
    """As :class:`mobula.rag.dro.answering.Chooser`."""

    encoded: Encoded
    pointer: Pointer
    reader: Reader

    def pick(self, asked: Asked) -> tuple[Positions, list[float]]:
        """One pass of the pointer over all candidates."""
        orders, log_probs = select(self.pointer, self.encoded.features([asked.text], [asked]), None)
        return orders[0, 0].tolist(), log_probs[0, 0].exp().tolist()

    def reply(self, asked: Asked, order: Positions) -> str:
        """The likeliest span."""
        return answer(self.reader, read(self.reader, self.encoded.beside(asked, order)))


def open_chooser(
    config: Config, weights: Mapping[str, Path], documents: Sequence[Document], vectors: np.ndarray
) -> PassageChooser:
    """Both networks, over passages with their ``vectors`` f32[N, D]."""
    encoded = Encoded(encoder_of(config.retrieve.encoder), documents, vectors, config.model.passage_tokens)
    made = {
        kind: network(kind, config.model, config.retrieve.choose, encoded, path).eval()
        for kind, path in weights.items()
    }
    return PassageChooser(encoded, made["selector"], made["generator"])  # type: ignore[arg-type]
