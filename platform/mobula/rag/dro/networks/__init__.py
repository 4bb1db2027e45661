"""DRO's two networks behind one interface: small ones for facts, small ones for passages, and language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mobula.alternation import Row
from mobula.rag.dro.data import FactWorld, Questions, subset
from mobula.rag.dro.networks.base import Generator, MStep, Network, Scores, Selection, Selector, weighted_loss
from mobula.rag.dro.networks.facts import FactGenerator, FactSelector
from mobula.rag.dro.networks.language import LanguageGenerator, LanguageSelector
from mobula.rag.dro.networks.passages import PassageGenerator, PassageSelector, Reading
from mobula.rag.exact import log_marginal

__all__ = ["MStep", "Network", "Networks", "Reading", "Scores", "Selection", "network_of", "weighted_loss"]
FACTS = {"selector": FactSelector, "generator": FactGenerator}
PASSAGES = {"selector": PassageSelector, "generator": PassageGenerator}
LANGUAGE = {"selector": LanguageSelector, "generator": LanguageGenerator}


def network_of(kind: str, questions: Questions, weights: Path | None = None) -> Any:
    """A ``selector`` or a ``generator`` for some questions, with the weights of a file or fresh ones."""
    if isinstance(questions, FactWorld):
        return FACTS[kind](questions, weights)  # type: ignore[abstract]
    return (LANGUAGE if questions.config.model.base else PASSAGES)[kind](questions, weights)  # type: ignore[abstract]


@dataclass(frozen=True)
class Networks:
    """A selector and a generator, and the questions that they are asked."""

    questions: Questions
    selector: Selector
    generator: Generator

    @classmethod
    def of(cls, questions: Questions, selector: Path, generator: Path) -> Networks:
        """With the weights of two files."""
        one, other = network_of("selector", questions, selector), network_of("generator", questions, generator)
        return cls(questions, one, other)

    def select(self, questions: Any, how: str) -> list[Selection]:
        """One permutation a question, greedily by the selector or by another of the selections."""
        if how == "selector":
            return self.selector.select(questions)
        return [Selection(z, [], len(z)) for z in self.questions.select(questions, how)]

    def exact(self, questions: Any) -> tuple[Tensor, Tensor]:
        """log p(z|x) and log p(y|x,d_z) f64[N, Z] of all permutations, where they are enumerated."""
        every = [self.questions.permutations()] * len(questions)
        return self.selector.log_prob(questions, every), self.generator.log_likelihood(questions, every)

    def evaluate(self, questions: Any, how: str) -> list[Row]:
        """Select, answer and compare with what is right, greedily; and log p(y|x) where permutations are enumerated."""
        selections, there = self.select(questions, how), self.questions.answerable(questions)
        permutations = [selection.permutation for selection in selections]
        answers = self.generator.answer(questions, permutations)
        if how != "none":  # without candidates nothing is answered, unless no passage is wanted
            answers = [answer if i in set(there) else "" for i, answer in enumerate(answers)]
        rows = self.questions.measure(questions, permutations, answers)
        if self.questions.config.select.decode == "free":
            rows = [
                {**row, "repaired": float(one.named < len(one.permutation))}
                for row, one in zip(rows, selections, strict=True)
            ]
        if self.questions.enumerable:
            log_p = dict(zip(there, log_marginal(*self.exact(subset(questions, there))).tolist(), strict=True))
            rows = [{**row, "log_p": log_p.get(i, self.generator.floor)} for i, row in enumerate(rows)]
        return rows
