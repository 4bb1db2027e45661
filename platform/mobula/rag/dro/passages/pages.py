"""Texts as the reader sees them: tokens, where they stand, and which spans of them are the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.data.questions import Reading
from mobula.evaluation.answers import normal
from mobula.rag.dro.passages.reader import CLOSED, QUESTION, SPAN


@dataclass(frozen=True)
class Page:
    """A text's tokens, and the characters that each stands for (start, end)."""

    text: str
    tokens: np.ndarray
    places: np.ndarray

    def span(self, start: int, length: int) -> str:
        """The text of ``length`` + 1 tokens from ``start``."""
        return self.text[self.places[start, 0] : self.places[start + length, 1]].strip()


@dataclass(frozen=True)
class Row:
    """A question beside a page, with the spans (start, length - 1) that are the answer; whether yes or no is."""

    question: np.ndarray
    page: Page
    spans: list[tuple[int, int]]
    closed: list[int]


def pages(encoder: Any, texts: Sequence[str], most: int) -> list[Page]:
    """Texts as the tokenizer of an encoder cuts them, up to ``most`` tokens."""
    tokenizer = getattr(encoder.tokenizer, "backend_tokenizer", encoder.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [
        Page(text, np.array(one.ids[:most], dtype=np.int64), np.array(one.offsets[:most]).reshape(-1, 2))
        for text, one in zip(texts, found, strict=True)
    ]


def spans(page: Page, golds: Sequence[str]) -> list[tuple[int, int]]:
    """Every short span whose normal form is that of a gold answer."""
    wanted = {normal(gold) for gold in golds} - {""}
    found = []
    for start in range(len(page.tokens)):
        # Most tokens begin no answer; an article or a mark, whose normal form is empty, may stand before one.
        word = normal(page.span(start, 0))
        if any(gold.startswith(word) for gold in wanted):
            stop = min(SPAN, len(page.tokens) - start)
            found += [(start, length) for length in range(stop) if normal(page.span(start, length)) in wanted]
    return found


def asked_about(encoder: Any, question: str, found: Sequence[Page], golds: Sequence[str]) -> list[Row]:
    """A question beside each of some pages."""
    tokens = pages(encoder, [question], QUESTION)[0].tokens
    closed = [CLOSED.index(normal(gold)) for gold in golds if normal(gold) in CLOSED]
    return [Row(tokens, page, spans(page, golds), closed) for page in found]


def reading_rows(encoder: Any, readings: Sequence[Reading], most: int) -> list[Row]:
    """Questions beside the part of their text that holds the answer; those with a longer answer are left out."""
    rows = []
    whole = pages(encoder, [reading.text for reading in readings], 10**6)
    for reading, page in zip(readings, whole, strict=True):
        answer = reading.text[reading.start : reading.end]
        at = int(np.searchsorted(page.places[:, 1], reading.start, side="right"))
        # The answer stands a third into the window, so that where it stands says little.
        start = max(0, min(at - at % (most // 2), len(page.tokens) - most))
        part = Page(page.text, page.tokens[start : start + most], page.places[start : start + most])
        row = asked_about(encoder, reading.question, [part], [answer])[0]
        if row.spans:
            rows.append(row)
    return rows


def batched(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Tokens of questions i64[R, Q] and pages i64[R, P], -1 behind the last, gold spans bool[R, P, SPAN] and [R, 2]."""
    gold = torch.zeros(len(rows), max(1, *(len(row.page.tokens) for row in rows)), SPAN, dtype=torch.bool)
    closed = torch.zeros(len(rows), len(CLOSED), dtype=torch.bool)
    for number, row in enumerate(rows):
        for start, length in row.spans:
            gold[number, start, length] = True
        closed[number, row.closed] = True
    question = _padded([row.question for row in rows], 1)
    return {
        "question": question,
        "passage": _padded([row.page.tokens for row in rows], 1),
        "gold": gold,
        "gold_closed": closed,
    }


def _padded(rows: Sequence[np.ndarray], least: int) -> Tensor:
    whole = torch.full((len(rows), max(least, *(len(row) for row in rows))), -1, dtype=torch.long)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = torch.from_numpy(row)
    return whole
