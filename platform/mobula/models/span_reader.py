"""A small extractive reader: scores every short span of the passages beside a question (span-marginal likelihood).

p(y|x,d_z) is the share of the probability of all spans, yes and no that falls on those whose normal form is the gold
answer's. A reader of one passage at a time cannot compare two; what it knows of their order is one number a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.data.questions import Reading
from mobula.evaluation.answers import normal

SPAN = 10  # tokens of the longest answer
QUESTION = 32  # tokens of a question that are read
CLOSED = ("yes", "no")
# p(y) = (1 - FLOOR) p(spans) + FLOOR / OTHERS: finite for an answer that is in no passage.
FLOOR, OTHERS = 1e-4, 10_000
NOTHING = -1e4  # log-probability of what is not there, small but finite so that gradients are


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens i64[P], and the characters i64[P, 2] that each stands for (start, end)."""

    text: str
    tokens: np.ndarray
    offsets: np.ndarray

    def span(self, start: int, length: int) -> str:
        """The text of ``length`` + 1 tokens from ``start``."""
        return self.text[self.offsets[start, 0] : self.offsets[start + length, 1]].strip()


@dataclass(frozen=True)
class Example:
    """A question beside a text, with the spans (start, length - 1) that are the answer; whether yes or no is."""

    question: np.ndarray
    text: TokenizedText
    spans: list[tuple[int, int]]
    closed: list[int]


class Reader(nn.Module):
    """Scores of spans. ``table`` f32[V, dim] holds the frozen vectors of tokens and is not among the weights."""

    table: Tensor

    def __init__(self, table: Tensor, layers: int, width: int, heads: int, passage_tokens: int, choose: int) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.project = nn.Linear(table.shape[1], width)
        self.places = nn.Embedding(QUESTION + passage_tokens, width)
        self.shared = nn.Embedding(2, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.ends = nn.Linear(width, 2)
        self.length = nn.Parameter(torch.zeros(SPAN))
        self.closed = nn.Linear(width, len(CLOSED))
        self.rank = nn.Parameter(torch.zeros(choose))

    def forward(self, question: Tensor, passage: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of spans f[R, P, SPAN] by start and length, and of yes and no f[R, 2].

        From tokens i64[R, Q] and i64[R, P], negative where there is none.
        """
        tokens = torch.cat([question, passage], 1)
        absent = tokens < 0
        positions = torch.cat([torch.arange(question.shape[1]), QUESTION + torch.arange(passage.shape[1])])
        shared = (passage.unsqueeze(2) == question.masked_fill(question < 0, -2).unsqueeze(1)).any(2)
        shared = torch.cat([torch.zeros_like(question).bool(), shared], 1)
        states = self.project(F.embedding(tokens.clamp(min=0), self.table)) + self.places(positions.to(tokens.device))
        states = self.layers(states + self.shared(shared.long()), src_key_padding_mask=absent)
        query_states, read = states[:, : question.shape[1]], states[:, question.shape[1] :]
        there = (question >= 0).unsqueeze(-1)
        closed = self.closed((query_states * there).sum(1) / there.sum(1).clamp(min=1))
        start, end = self.ends(read).unbind(-1)
        end = F.pad(end.masked_fill(passage < 0, NOTHING), (0, SPAN - 1), value=NOTHING).unfold(1, SPAN, 1)
        return start.unsqueeze(-1) + end + self.length, closed


def log_partition(spans: Tensor, closed: Tensor, gold: Tensor, gold_closed: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the summed exponentials f[R]: of gold spans, and of all. :data:`NOTHING` where none is gold."""
    scores = torch.cat([spans.flatten(1), closed], 1)
    right = torch.cat([gold.flatten(1), gold_closed], 1)
    return torch.logsumexp(scores.masked_fill(~right, NOTHING), 1), torch.logsumexp(scores, 1)


def log_likelihood(gold: Tensor, whole: Tensor, rank: Tensor) -> Tensor:
    """log p(y|x,d_z) f[...] from the log-partitions f[..., K] of passages in their order, and a number a rank."""
    share = torch.logsumexp(gold + rank, -1) - torch.logsumexp(whole + rank, -1)
    # Log-partitions of nothing at all are far below the floor.
    return torch.logaddexp(share + math.log1p(-FLOOR), torch.full_like(share, math.log(FLOOR / OTHERS)))


def tokenized(encoder: Any, texts: Sequence[str], most: int) -> list[TokenizedText]:
    """Texts as the tokenizer of an encoder cuts them, up to ``most`` tokens."""
    tokenizer = getattr(encoder.tokenizer, "backend_tokenizer", encoder.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [
        TokenizedText(text, np.array(one.ids[:most], dtype=np.int64), np.array(one.offsets[:most]).reshape(-1, 2))
        for text, one in zip(texts, encodings, strict=True)
    ]


def examples(encoder: Any, question: str, texts: Sequence[TokenizedText], golds: Sequence[str]) -> list[Example]:
    """A question beside each of some texts."""
    tokens = tokenized(encoder, [question], QUESTION)[0].tokens
    closed = [CLOSED.index(normal(gold)) for gold in golds if normal(gold) in CLOSED]
    return [Example(tokens, text, answer_spans(text, golds), closed) for text in texts]


def answer_spans(text: TokenizedText, golds: Sequence[str]) -> list[tuple[int, int]]:
    """Every short span whose normal form is that of a gold answer."""
    wanted = {normal(gold) for gold in golds} - {""}
    spans = []
    for start in range(len(text.tokens)):
        # Most tokens begin no answer; an article or a mark, whose normal form is empty, may stand before one.
        word = normal(text.span(start, 0))
        if any(gold.startswith(word) for gold in wanted):
            stop = min(SPAN, len(text.tokens) - start)
            spans += [(start, length) for length in range(stop) if normal(text.span(start, length)) in wanted]
    return spans


def squad_examples(encoder: Any, readings: Sequence[Reading], most: int) -> list[Example]:
    """Questions beside the part of their text that holds the answer; those with a longer answer are left out."""
    rows = []
    whole = tokenized(encoder, [reading.text for reading in readings], 10**6)
    for reading, text in zip(readings, whole, strict=True):
        answer = reading.text[reading.start : reading.end]
        at = int(np.searchsorted(text.offsets[:, 1], reading.start, side="right"))
        # The answer stands a third into the window, so that where it stands says little.
        start = max(0, min(at - at % (most // 2), len(text.tokens) - most))
        window = TokenizedText(text.text, text.tokens[start : start + most], text.offsets[start : start + most])
        (row,) = examples(encoder, reading.question, [window], [answer])
        if row.spans:
            rows.append(row)
    return rows


def collate(rows: Sequence[Example]) -> dict[str, Tensor]:
    """Tokens of questions i64[R, Q] and texts i64[R, P], -1 behind the last, gold spans bool[R, P, SPAN] and [R, 2]."""
    gold = torch.zeros(len(rows), max(1, *(len(row.text.tokens) for row in rows)), SPAN, dtype=torch.bool)
    closed = torch.zeros(len(rows), len(CLOSED), dtype=torch.bool)
    for number, row in enumerate(rows):
        for start, length in row.spans:
            gold[number, start, length] = True
        closed[number, row.closed] = True
    question, passage = _padded([row.question for row in rows]), _padded([row.text.tokens for row in rows])
    return {"question": question, "passage": passage, "gold": gold, "gold_closed": closed}


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    whole = torch.full((len(rows), max(1, *(len(row) for row in rows))), -1, dtype=torch.long)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = torch.from_numpy(row)
    return whole
