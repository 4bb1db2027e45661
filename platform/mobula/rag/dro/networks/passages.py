"""DRO's small networks for real questions: a pointer over passage vectors, and a reader of spans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.alternation import Row
from mobula.data.questions import squad
from mobula.evaluation.answers import exact_match, f1
from mobula.models import span_reader
from mobula.models.listwise import Pointer
from mobula.models.span_reader import CLOSED, FLOOR, OTHERS, SPAN, Example, Reader, log_likelihood, log_partition
from mobula.rag.candidates import Request
from mobula.rag.dro.networks.base import Generator, MStep, Scores, Selection, Selector, aligned
from mobula.rag.encoded_passages import PassageEncoder, open_passages
from mobula.rag.search import encoder_of
from mobula.rag.selections import Permutation


def passage_encoder(questions: Any) -> PassageEncoder:
    """That of a run's questions."""
    config = questions.config
    return open_passages(questions.candidates, config.retrieve.encoder, config.model.passage_tokens)


class PassageSelector(Selector):
    """A pointer over the passages' vectors."""

    def fresh(self) -> Pointer:
        model, dim = self.questions.config.model, passage_encoder(self.questions).encoder.dim
        return Pointer(dim, model.layers, model.selector_width, model.heads, self.questions.sizes[1])

    def batch(self, questions: Sequence[Request], rows: Sequence[Row]) -> dict[str, Tensor]:
        permutations, weights = aligned(rows)
        return {**passage_encoder(self.questions).features(questions), "permutations": permutations, "weights": weights}

    def log_probs(self, module: Pointer, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["question"], batch["passages"], batch["ranks"], batch["permutations"]).flatten(0, 1)

    @torch.inference_mode()
    def sample(self, questions: Sequence[Request], m: int, seeds: Sequence[int]) -> list[Row]:
        """Each question has its own numbers."""
        rows: list[Row] = []
        encoder, size = passage_encoder(self.questions), (m, self.questions.sizes[1])
        for at in range(0, len(questions), self.part):
            part = slice(at, at + self.part)
            uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(size) for seed in seeds[part]]))
            permutations, _ = self.module.sample(**encoder.features(questions[part]), uniform=uniform)
            rows += [{"permutations": one} for one in permutations.tolist()]
        return rows

    @torch.inference_mode()
    def select(self, questions: Sequence[Request]) -> list[Selection]:
        """A question without candidates has the empty permutation."""
        selections = [Selection([], [], 0)] * len(questions)
        there = self.questions.answerable(questions)
        for at in range(0, len(there), self.part):
            part = there[at : at + self.part]
            features = passage_encoder(self.questions).features([questions[i] for i in part])
            permutations, log_probs = self.module.sample(**features, uniform=None)
            for i, one, scores in zip(part, permutations[:, 0].tolist(), log_probs[:, 0].tolist(), strict=True):
                selections[i] = Selection(one, scores, len(one))
        return selections


@dataclass(frozen=True)
class Read:
    """A passage as it was read: log-partitions of gold and of all spans, the best span's score, and its text."""

    gold: float
    whole: float
    best: float
    text: str


class PassageGenerator(Generator):
    """A reader of the chosen passages; each is read once, whatever the permutations that name it."""

    floor = math.log(FLOOR / OTHERS)
    reads_first = True

    def fresh(self) -> Reader:
        model, table = self.questions.config.model, passage_encoder(self.questions).table
        sizes = (model.layers, model.generator_width, model.heads, model.passage_tokens)
        return Reader(table, *sizes, self.questions.sizes[1])

    def batch(self, questions: Sequence[Request], rows: Sequence[Row]) -> dict[str, Tensor]:
        """Each passage that is named, once, and which of them ``at`` i64[N, m, K] make the permutations."""
        permutations, weights = aligned(rows)
        listed: list[list[Permutation]] = permutations.tolist()
        named, numbers = self._named(questions, listed)
        index = {(questions[i], z): at for (i, z), at in numbers.items()}  # a batch may have a question twice
        at = torch.tensor([[[index[questions[i], z] for z in one] for one in some] for i, some in enumerate(listed)])
        return {**span_reader.collate(named), "at": at, "weights": weights}

    def log_probs(self, module: Reader, batch: dict[str, Tensor]) -> Tensor:
        spans, closed = module(batch["question"], batch["passage"])
        gold, whole = log_partition(spans, closed, batch["gold"], batch["gold_closed"])
        at = batch["at"]
        return log_likelihood(gold[at], whole[at], module.rank[: at.shape[-1]]).view(-1, 1)

    @torch.inference_mode()
    def score(self, questions: Sequence[Request], permutations: Sequence[Sequence[Permutation]]) -> list[Scores]:
        """In double precision over the passages."""
        parts = zip(questions, self._read(questions, permutations), permutations, strict=True)
        return [self._score(*part) for part in parts]

    def answer(self, questions: Sequence[Request], permutations: Sequence[Permutation]) -> list[str]:
        """The likeliest span; nothing without passages."""
        passages = self._read(questions, [[permutation] for permutation in permutations])
        return [self._likeliest(read, z) for read, z in zip(passages, permutations, strict=True)]

    def _score(self, request: Request, read: Mapping[int, Read], permutations: Sequence[Permutation]) -> Scores:
        rank = self.module.rank.double()[: len(permutations[0])]
        gold = torch.tensor([[read[z].gold for z in p] for p in permutations]).double()
        whole = torch.tensor([[read[z].whole for z in p] for p in permutations]).double()
        answers = [self._likeliest(read, p) for p in permutations]
        scored = {text: (exact_match(text, request.answers), f1(text, request.answers)) for text in set(answers)}
        right, reward = zip(*(scored[text] for text in answers), strict=True)
        return Scores(log_likelihood(gold, whole, rank).tolist(), list(right), list(reward))

    def _likeliest(self, read: Mapping[int, Read], permutation: Permutation) -> str:
        ranks = self.module.rank.tolist()
        spans = [(read[z].best + rank, read[z].text) for z, rank in zip(permutation, ranks, strict=False)]
        return max(spans, key=lambda span: span[0], default=(0.0, ""))[1]

    def _named(
        self, questions: Sequence[Request], permutations: Sequence[Sequence[Permutation]]
    ) -> tuple[list[Example], dict[tuple[int, int], int]]:
        """The passages that permutations name, and their number by question and position."""
        named = [sorted({z for permutation in one for z in permutation}) for one in permutations]
        pairs = [(i, z) for i, positions in enumerate(named) for z in positions]
        encoder = passage_encoder(self.questions)
        return [encoder.example(questions[i], z) for i, z in pairs], {pair: at for at, pair in enumerate(pairs)}

    @torch.inference_mode()
    def _read(
        self, questions: Sequence[Request], permutations: Sequence[Sequence[Permutation]]
    ) -> list[dict[int, Read]]:
        """By question and position, what the reader makes of the passages that permutations name."""
        rows, at = self._named(questions, permutations)
        read = [one for start in range(0, len(rows), self.part) for one in self._spans(rows[start : start + self.part])]
        results: list[dict[int, Read]] = [{} for _ in questions]
        for (i, z), number in at.items():
            results[i][z] = read[number]
        return results

    def _spans(self, rows: Sequence[Example]) -> list[Read]:
        batch = span_reader.collate(rows)
        spans, closed = self.module(batch["question"], batch["passage"])
        gold, whole = log_partition(spans, closed, batch["gold"], batch["gold_closed"])
        best, index = torch.cat([spans.flatten(1), closed], 1).max(1)
        count = spans.shape[1] * SPAN  # yes and no are counted behind them
        texts = [
            CLOSED[at - count] if at >= count else row.text.span(at // SPAN, at % SPAN)
            for row, at in zip(rows, index.tolist(), strict=True)
        ]
        return [Read(*one) for one in zip(gold.tolist(), whole.tolist(), best.tolist(), texts, strict=True)]


@dataclass
class Reading(MStep):
    """The reader's course before the cold start: SQuAD's questions, each beside its text."""

    @cached_property
    def rows(self) -> list[Example]:
        """One a question."""
        config = self.network.questions.config
        encoder = encoder_of(config.retrieve.encoder)
        return span_reader.squad_examples(encoder, squad(config.cold.reading_path), config.model.passage_tokens)

    @property
    def tokens(self) -> float:
        """An answer is one span."""
        return 1

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One text a question."""
        rows, at = [self.rows[i] for i in indices.tolist()], torch.arange(len(indices))
        batch = {**span_reader.collate(rows), "at": at.view(-1, 1, 1)}
        return {**batch, "weights": torch.ones(len(rows)), "queries": at}
