"""Real questions with language models as a source.

An order is a list of positions among the candidates as they are shown, from 0; the selector's prompt calls them 1 to n.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from mobula.alternation import Row
from mobula.config import digest
from mobula.models.causal import CausalModel
from mobula.models.pretrained import Pretrained
from mobula.rag.candidates import Asked
from mobula.rag.dro.asked import Positions, wording
from mobula.rag.dro.language.networks import Generator, LanguageNetworks, Selector, adapted
from mobula.rag.dro.language.training import LanguageTask, Target
from mobula.rag.dro.pair import KINDS, Pair
from mobula.rag.dro.questions import Questions
from mobula.rag.dro.source import NotEnumerable, Order, Wording

HEADER = "selector and generator are {base} under adapters; the paper's 8B models and its figures are not reproduced"


@dataclass(frozen=True)
class Language(Questions):
    """As :class:`mobula.rag.dro.source.Source`, with one pretrained model adapted twice."""

    enumerable = False
    views = ("retriever", "first", "gold", "no_gold")

    @property
    def wording(self) -> Wording:
        """Sampled likelihoods, and lists that had to be filled."""
        told = wording(self.config, HEADER.format(base=self.config.model.base), self.enumerable)
        if self.config.select.decode == "free":
            filled = {"repaired": ("lists that had to be filled, per cent", 100.0)}
            return replace(told, measures={**told.measures, **filled})
        return told

    @property
    def identity(self) -> str:
        """What decides a training beside its rows."""
        model = Pretrained.find(self.config.model.base).hash
        return digest([self.found, asdict(self.config.model), asdict(self.config.select), model])

    def orders(self) -> list[Order]:
        """Orders are not listed."""
        raise NotEnumerable("lists of a language model are sampled, not enumerated")

    def fresh(self, kind: str, directory: Path, seed: int) -> Path | None:
        """Nothing is learned beforehand: the model is pretrained."""
        return None

    def task(self, kind: str, split: str, rows: Path, start: Path | None, seed: int) -> LanguageTask:
        """As :class:`LanguageTask`."""
        return LanguageTask(self, kind, split, rows, start, seed)

    def open(self, pair: Pair) -> LanguageNetworks:
        """Both models, on the accelerator if there is one."""
        selector, generator = (self.model(kind, getattr(pair, kind), 0).placed() for kind in KINDS)
        made = Selector.of(selector, self.config), Generator.of(generator, self.config)
        return LanguageNetworks(self.candidates, *made, self.config.retrieve.choose)

    def model(self, kind: str, start: Path | None, seed: int) -> CausalModel:
        """The pretrained model under adapters: those of a file, or fresh ones of a seed."""
        return adapted(self.config, start, seed)

    def targets(self, kind: str, split: str, row: Row) -> list[Target]:
        """What a model learns from a question's weighted orders; equal ones are one target with their weights summed.

        A selector learns the passages that a list named by itself, nothing of what filled it.
        """
        asked = self.candidates.splits[split][row["query"]]
        valid = row.get("valid", [len(order) for order in row["orders"]])
        total: Counter[tuple[int, ...]] = Counter()
        for order, count, weight in zip(row["orders"], valid, row["weights"], strict=True):
            total[tuple(order[:count] if kind == "selector" else order)] += weight
        write = self._list if kind == "selector" else self._answer
        found = ((write(asked, list(order)), weight) for order, weight in total.items() if order or kind != "selector")
        return [Target(*target, weight) for target, weight in found]

    def export(self, folder: Path, pair: Pair) -> None:
        """Both adapters, passages and their vectors."""
        for kind in KINDS:
            shutil.copyfile(getattr(pair, kind), folder / f"{kind}.safetensors")
        self.write_questions(folder)

    def meta(self) -> dict[str, Any]:
        """Sizes, and the model under the adapters."""
        return {**self.sizes(), "hash": Pretrained.find(self.config.model.base).hash}

    def _list(self, asked: Asked, order: Positions) -> tuple[list[int], list[int], list[list[int]] | None]:
        selector = Selector.of(_tokens(self.config.model.base), self.config)
        documents = [self.candidates.document(id) for id in asked.candidates]
        k = self.config.retrieve.choose
        prompt, tokens = selector.prompts.select(asked.text, documents, k), selector.grammar.tokens(order)
        if selector.constrained:
            return prompt, tokens, [allowed for _, allowed in selector.grammar.steps(order, len(documents))]
        # A list that stopped early is learned without its end.
        return prompt, [*tokens, selector.model.eos] if len(order) == k else tokens, None

    def _answer(self, asked: Asked, order: Positions) -> tuple[list[int], list[int], None]:
        generator = Generator.of(_tokens(self.config.model.base), self.config)
        documents = [self.candidates.document(asked.candidates[place]) for place in order]
        return generator.prompts.answer(asked.text, documents), generator.target(asked.answers[0]), None


@lru_cache(maxsize=2)
def _tokens(base: str) -> CausalModel:
    """A model's tokenizer, without its network."""
    return CausalModel(nn.Identity(), Pretrained.find(base).tokenizer(), base)
