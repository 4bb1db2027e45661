"""Selector and generator as language models, at work on questions with their candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mobula.alternation import Row
from mobula.data.records import Document
from mobula.evaluation.answers import exact_match, f1
from mobula.models.causal import CausalModel, Sampling
from mobula.rag.candidates import Asked, Candidates
from mobula.rag.dro.asked import Positions, chosen, measured
from mobula.rag.dro.config import Config
from mobula.rag.dro.language.lists import Grammar, draw, longest
from mobula.rag.dro.language.prompts import Prompts
from mobula.rag.dro.pair import KINDS
from mobula.rag.dro.source import Judged, Measured, NotEnumerable
from mobula.rag.permutations import parse_permutation, repaired
from mobula.training import load_weights

BATCH_TOKENS = 4096  # padded tokens that are scored together


@dataclass(frozen=True)
class Selector:
    """Chooses passages: a language model, its prompts and the grammar of its lists."""

    model: CausalModel
    prompts: Prompts
    grammar: Grammar
    constrained: bool

    @classmethod
    def of(cls, model: CausalModel, config: Config) -> Selector:
        """As the config says.

        Raises:
            AmbiguousIds: as :meth:`Grammar.of`.
        """
        select, retrieve = config.select, config.retrieve
        prompts = Prompts(model, config.model.passage_tokens, config.model.positions, select.labels)
        grammar = Grammar.of(model, select.labels, retrieve.candidates, retrieve.choose)
        return cls(model, prompts, grammar, select.decode == "constrained")

    def sample(self, question: str, documents: Sequence[Document], samples: int, seed: int) -> Row:
        """A row ``{orders}`` and, of free text, how many passages each ``valid`` list named."""
        n, prompt = len(documents), self.prompts.select(question, documents, self.grammar.k)
        if self.constrained:
            uniform = np.random.default_rng(seed).random((samples, longest(self.grammar)))
            return {"orders": [walk.order for walk in draw(self.model, prompt, self.grammar, n, uniform)]}
        seeds = np.random.default_rng(seed).integers(2**31, size=samples).tolist()
        said = self.model.sample([prompt] * samples, Sampling(2 * longest(self.grammar)), seeds)
        found = [self._read(one.ids, n) for one in said]
        return {"orders": [order for order, _ in found], "valid": [valid for _, valid in found]}

    def greedy(self, question: str, documents: Sequence[Document]) -> tuple[Positions, list[float], int]:
        """The greedy order, log p of each choice, and how many passages it named by itself.

        Of free text there are no probabilities of choices: they are empty.
        """
        n, prompt = len(documents), self.prompts.select(question, documents, self.grammar.k)
        if self.constrained:
            (walk,) = draw(self.model, prompt, self.grammar, n, None)
            return walk.order, walk.log_probs, len(walk.order)
        (said,) = self.model.sample([prompt], Sampling(2 * longest(self.grammar), temperature=0), [0])
        order, valid = self._read(said.ids, n)
        return order, [], valid

    def _read(self, ids: Sequence[int], n: int) -> tuple[Positions, int]:
        named = parse_permutation(self.model.decode(ids), n)[: self.grammar.k]
        return [place - 1 for place in repaired(named, n, self.grammar.k)], len(named)


@dataclass(frozen=True)
class Generator:
    """Answers from passages: a language model and its prompts."""

    model: CausalModel
    prompts: Prompts
    most: int

    @classmethod
    def of(cls, model: CausalModel, config: Config) -> Generator:
        """As the config says."""
        prompts = Prompts(model, config.model.passage_tokens, config.model.positions, "numbers")
        return cls(model, prompts, config.model.answer_tokens)

    def target(self, answer: str) -> list[int]:
        """An answer's tokens, end of turn included."""
        return [*self.model.encode(answer), self.model.eos]

    def reply(self, questions: Sequence[str], documents: Sequence[Sequence[Document]]) -> list[str]:
        """Greedy answers."""
        prompts = [self.prompts.answer(*pair) for pair in zip(questions, documents, strict=True)]
        found = self.model.sample(prompts, Sampling(self.most, temperature=0), [0] * len(prompts), batch=16)
        return [self.model.decode(one.ids).strip() for one in found]

    def log_lik(self, question: str, documents: Sequence[Sequence[Document]], answer: str) -> Tensor:
        """log p(y|x,d_z) f64[m] of an answer after each of m contexts, summed over its tokens."""
        prompts = [self.prompts.answer(question, one) for one in documents]
        scores = self.model.log_probs(prompts, [self.target(answer)] * len(prompts), BATCH_TOKENS)
        return torch.stack([one.double().sum() for one in scores])


@dataclass(frozen=True)
class LanguageNetworks:
    """As :class:`mobula.rag.dro.source.Networks`."""

    candidates: Candidates
    selector: Selector
    generator: Generator
    k: int

    def sample(self, split: str, queries: Sequence[int], samples: int, seeds: Sequence[int]) -> list[Row]:
        """One prompt a question, read once for all of its samples."""
        asked = self._asked(split, queries)
        return [
            self.selector.sample(one.text, self._shown(one), samples, seed)
            for one, seed in zip(asked, seeds, strict=True)
        ]

    def choose(self, split: str, queries: Sequence[int], how: str) -> list[Positions]:
        """The selector's are greedy; a question without candidates has none."""
        return [self._chosen(one, how)[0] for one in self._asked(split, queries)]

    def judge(self, split: str, queries: Sequence[int], orders: Sequence[Sequence[Positions]]) -> list[Judged]:
        """Contexts that are the same are read once."""
        parts = zip(self._asked(split, queries), orders, strict=True)
        return [self._judged(one, found) for one, found in parts]

    def measure(self, split: str, queries: Sequence[int], how: str) -> Measured:
        """Greedy; and the share of lists that had to be filled, where they are read from free text."""
        asked = self._asked(split, queries)
        found = [self._chosen(one, how) for one in asked]
        contexts = [self._named(one, order) for one, (order, _) in zip(asked, found, strict=True)]
        said = self.generator.reply([one.text for one in asked], contexts)
        # Without candidates nothing is answered, unless no passage is wanted.
        said = [text if how == "none" or one.candidates else "" for one, text in zip(asked, said, strict=True)]
        orders = [order for order, _ in found]
        filled = np.array([float(valid < len(order)) for order, valid in found])
        return {**measured(self.candidates, asked, orders, said, self.k), "repaired": filled}

    def exact(self, split: str, queries: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Orders are not listed: each would have to be read by the generator."""
        raise NotEnumerable("lists of a language model are sampled, not enumerated")

    def _asked(self, split: str, queries: Sequence[int]) -> list[Asked]:
        return [self.candidates.splits[split][query] for query in queries]

    def _shown(self, asked: Asked) -> list[Document]:
        return [self.candidates.document(id) for id in asked.candidates]

    def _named(self, asked: Asked, order: Positions) -> list[Document]:
        return [self.candidates.document(asked.candidates[place]) for place in order]

    def _chosen(self, asked: Asked, how: str) -> tuple[Positions, int]:
        if how == "selector" and asked.candidates:
            order, _, valid = self.selector.greedy(asked.text, self._shown(asked))
            return order, valid
        order = chosen(self.candidates, asked, how, self.k) if how != "selector" else []
        return order, len(order)

    def _judged(self, asked: Asked, orders: Sequence[Positions]) -> Judged:
        different = list(dict.fromkeys(map(tuple, orders)))
        contexts = [self._named(asked, list(order)) for order in different]
        scores = self.generator.log_lik(asked.text, contexts, asked.answers[0]).tolist()
        said = self.generator.reply([asked.text] * len(contexts), contexts)
        found = dict(zip(different, zip(scores, said, strict=True), strict=True))
        rows = [found[tuple(order)] for order in orders]
        tokens = len(self.generator.target(asked.answers[0]))
        right = [exact_match(text, asked.answers) for _, text in rows]
        return Judged([score for score, _ in rows], right, [f1(text, asked.answers) for _, text in rows], tokens)


def adapted(config: Config, start: Path | None, seed: int = 0) -> CausalModel:
    """The pretrained model of a config under adapters: those of a file, or fresh ones of a seed."""
    shape = config.model
    model = CausalModel.adapted(shape.base, shape.lora_rank, shape.lora_alpha, seed)
    if start is not None:
        load_weights(model.network, start)
    return model


@dataclass(frozen=True)
class LanguageChooser:
    """As :class:`mobula.rag.dro.answering.Chooser`."""

    documents: Mapping[str, Document]
    selector: Selector
    generator: Generator

    def pick(self, asked: Asked) -> tuple[Positions, list[float]]:
        """Probabilities are those of whole labels, among the passages that are left."""
        order, log_probs, _ = self.selector.greedy(asked.text, [self.documents[id] for id in asked.candidates])
        return order, np.exp(log_probs).tolist()

    def reply(self, asked: Asked, order: Positions) -> str:
        """As the generator writes it."""
        return self.generator.reply([asked.text], [[self.documents[asked.candidates[place]] for place in order]])[0]


def open_chooser(
    config: Config, weights: Mapping[str, Path], documents: Sequence[Document], vectors: np.ndarray
) -> LanguageChooser:
    """Both models; ``vectors`` of passages are not looked at."""
    selector, generator = (adapted(config, weights[kind]).placed() for kind in KINDS)
    known = {document.id: document for document in documents}
    return LanguageChooser(known, Selector.of(selector, config), Generator.of(generator, config))
