"""DRO's networks as language models: a list-wise selector and a generator, one pretrained model adapted twice."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobula.alternation import Row
from mobula.data.records import Document
from mobula.evaluation.answers import exact_match, f1
from mobula.locks import alone
from mobula.models.causal import CausalModel
from mobula.models.constrained import Target, collate_targets, target_log_probs
from mobula.models.engines import by_torch, open_model
from mobula.models.finetune import MODEL, save_whole
from mobula.models.language_model import LanguageModel, Sampling
from mobula.models.pretrained import Pretrained
from mobula.rag.candidates import Request
from mobula.rag.dro.networks.base import Generator, Network, Scores, Selection, Selector
from mobula.rag.permutations import Grammar, parse_permutation, repaired, sample_lists
from mobula.rag.prompts import Prompts
from mobula.rag.selections import Permutation
from mobula.training import load_weights

SAMPLED = "sampled"  # end of the name of a folder with the model that an engine samples from, beside its weights
BATCH_TOKENS = 4096  # padded tokens that are scored together


class LanguageNetwork(Network):
    """A pretrained model: one prompt and one target a permutation."""

    def fresh(self) -> nn.Module:
        """As it is, its adapter of the seed that is set."""
        return self.questions.config.model.start(torch.initial_seed()).network.train()

    @cached_property
    def model(self) -> CausalModel:
        """The model, opened to be used, on the accelerator if there is one."""
        tokenizer = self.prompts.model
        return CausalModel(self.module, tokenizer.tokenizer, tokenizer.name).placed()

    @cached_property
    def sampler(self) -> LanguageModel:
        """Who writes texts that no grammar rules: an engine asks for the model as a folder, which stays where it is."""
        engine = self.questions.config.model.sampler
        if by_torch(engine) or self.weights is None:
            return self.model
        folder = self.weights.with_name(f"{self.weights.stem}-{SAMPLED}")
        with alone(folder):
            if not (folder / MODEL).is_dir():
                model = self.questions.config.model.start(0)
                load_weights(model.network, self.weights)
                save_whole(model, folder / MODEL)
        return open_model(str(folder / MODEL), engine)

    @cached_property
    def prompts(self) -> Prompts:
        """The selector's labels are as configured; a generator's passages have numbers."""
        model = self.questions.config.model
        kind = self.questions.config.select.labels
        return Prompts(tokenizer_of(model.base), model.passage_tokens, model.positions, kind)

    @abstractmethod
    def target(self, request: Request, permutation: Permutation, weight: float) -> Target:
        """What the model learns from a permutation."""

    def rows(self, rows: list[Row]) -> list[Row]:
        """Equal permutations of a question are one, with their weights summed, so that each is read once."""
        return [self._merged(row, row["permutations"]) for row in rows]

    def tokens(self, questions: Sequence[Request], rows: Sequence[Row]) -> float:
        """Counted in the targets."""
        targets = self.targets(questions, rows)
        return sum(len(target.tokens) for target in targets) / len(targets)

    def batch(self, questions: Sequence[Request], rows: Sequence[Row]) -> dict[str, Tensor]:
        """As :func:`collate_targets`."""
        return collate_targets(self.targets(questions, rows))

    def log_probs(self, module: Any, batch: dict[str, Tensor]) -> Tensor:
        """As :func:`target_log_probs`."""
        return target_log_probs(module, batch)

    def documents(self, request: Request, permutation: Permutation) -> list[Document]:
        """The passages of a permutation."""
        return [self.questions.candidates.document(request.candidates[i]) for i in permutation]

    def _merged(self, row: Row, permutations: Sequence[Permutation]) -> Row:
        total: Counter[tuple[int, ...]] = Counter()
        for permutation, weight in zip(permutations, row["weights"], strict=True):
            total[tuple(permutation)] += weight
        return {"query": row["query"], "permutations": [list(one) for one in total], "weights": list(total.values())}

    def targets(self, questions: Sequence[Request], rows: Sequence[Row]) -> list[Target]:
        """Those of all permutations of some rows."""
        return [
            self.target(request, permutation, weight)
            for request, row in zip(questions, rows, strict=True)
            for permutation, weight in zip(row["permutations"], row["weights"], strict=True)
        ]


class LanguageSelector(LanguageNetwork, Selector):
    """Writes a list of labels, under a grammar or as free text."""

    @property
    def constrained(self) -> bool:
        """Whether a grammar rules."""
        return self.questions.config.select.decode == "constrained"

    @cached_property
    def grammar(self) -> Grammar:
        """That of the lists.

        Raises:
            AmbiguousIds: as :meth:`Grammar.of`.
        """
        config = self.questions.config
        return Grammar.of(tokenizer_of(config.model.base), config.select.labels, *self.questions.sizes)

    def rows(self, rows: list[Row]) -> list[Row]:
        """Of a list that was filled, only what it named itself is learned; one that named nothing is left out."""
        merged = []
        for row in rows:
            valid = row.get("valid", [len(permutation) for permutation in row["permutations"]])
            named = [permutation[:count] for permutation, count in zip(row["permutations"], valid, strict=True)]
            kept = [i for i, permutation in enumerate(named) if permutation]
            if kept:
                part = {**row, "weights": [row["weights"][i] for i in kept]}
                merged.append(self._merged(part, [named[i] for i in kept]))
        return merged

    def target(self, request: Request, permutation: Permutation, weight: float) -> Target:
        """The list and its end; one that stopped early is learned without its end."""
        n, k = len(request.candidates), self.grammar.k
        prompt, tokens = self._prompt(request), self.grammar.tokens(permutation)
        if self.constrained:
            return Target(prompt, tokens, [allowed for _, allowed in self.grammar.steps(permutation, n)], weight)
        return Target(prompt, [*tokens, self.prompts.model.eos] if len(permutation) == k else tokens, None, weight)

    def sample(self, questions: Sequence[Request], m: int, seeds: Sequence[int]) -> list[Row]:
        """One prompt a question, read once for all of its samples."""
        return [self._sample(request, m, seed) for request, seed in zip(questions, seeds, strict=True)]

    def select(self, questions: Sequence[Request]) -> list[Selection]:
        """Greedy token by token; a question without candidates has the empty permutation."""
        return [self._select(request) if request.candidates else Selection([], [], 0) for request in questions]

    def parse(self, ids: Sequence[int], n: int) -> tuple[Permutation, int]:
        """The permutation of free text, filled, and how many passages it named."""
        named = parse_permutation(self.prompts.model.decode(ids), n)[: self.grammar.k]
        return [number - 1 for number in repaired(named, n, self.grammar.k)], len(named)

    def _prompt(self, request: Request) -> list[int]:
        every = self.documents(request, range(len(request.candidates)))  # type: ignore[arg-type]
        return self.prompts.select(request.text, every, self.grammar.k)

    def _sample(self, request: Request, m: int, seed: int) -> Row:
        n, prompt = len(request.candidates), self._prompt(request)
        if self.constrained:
            uniform = np.random.default_rng(seed).random((m, self.grammar.longest))
            walks = sample_lists(self.model, prompt, self.grammar, n, uniform)
            return {"permutations": [walk.permutation for walk in walks]}
        seeds = np.random.default_rng(seed).integers(2**31, size=m).tolist()
        texts = self.sampler.sample([prompt] * m, Sampling(2 * self.grammar.longest), seeds)
        permutations, valid = zip(*(self.parse(text.ids, n) for text in texts), strict=True)
        return {"permutations": list(permutations), "valid": list(valid)}

    def _select(self, request: Request) -> Selection:
        n, prompt = len(request.candidates), self._prompt(request)
        if self.constrained:
            (walk,) = sample_lists(self.model, prompt, self.grammar, n, None)
            return Selection(walk.permutation, walk.log_probs, len(walk.permutation))
        (text,) = self.sampler.sample([prompt], Sampling(2 * self.grammar.longest, temperature=0), [0])
        permutation, valid = self.parse(text.ids, n)
        return Selection(permutation, [], valid)


class LanguageGenerator(LanguageNetwork, Generator):
    """Writes an answer."""

    def target(self, request: Request, permutation: Permutation, weight: float) -> Target:
        """The first gold answer, end of turn included."""
        prompt = self.prompts.answer(request.text, self.documents(request, permutation))
        return Target(prompt, [*self.prompts.model.encode(request.answers[0]), self.prompts.model.eos], None, weight)

    def score(self, questions: Sequence[Request], permutations: Sequence[Sequence[Permutation]]) -> list[Scores]:
        """Contexts that are the same are read once."""
        return [self._score(*part) for part in zip(questions, permutations, strict=True)]

    def answer(self, questions: Sequence[Request], permutations: Sequence[Permutation]) -> list[str]:
        """As it is written."""
        parts = zip(questions, permutations, strict=True)
        return self._write([self.prompts.answer(one.text, self.documents(one, z)) for one, z in parts])

    def _score(self, request: Request, permutations: Sequence[Permutation]) -> Scores:
        distinct = list(dict.fromkeys(map(tuple, permutations)))
        targets = [self.target(request, list(one), 1.0) for one in distinct]
        prompts = [target.prompt for target in targets]
        log_lik = self.model.log_probs(prompts, [target.tokens for target in targets], BATCH_TOKENS)
        texts = self._write(prompts)
        columns = zip((float(one.double().sum()) for one in log_lik), texts, strict=True)
        rows = dict(zip(distinct, columns, strict=True))
        scores, answers = zip(*(rows[tuple(permutation)] for permutation in permutations), strict=True)
        right = [exact_match(text, request.answers) for text in answers]
        reward = [f1(text, request.answers) for text in answers]
        return Scores(list(scores), right, reward, len(targets[0].tokens))

    def _write(self, prompts: Sequence[list[int]]) -> list[str]:
        greedy = Sampling(self.questions.config.model.answer_tokens, temperature=0)
        texts = self.sampler.sample(prompts, greedy, [0] * len(prompts), batch=16)
        return [self.model.decode(text.ids).strip() for text in texts]


@lru_cache(maxsize=2)
def tokenizer_of(base: str) -> CausalModel:
    """A model's tokenizer, without its network."""
    return CausalModel(nn.Identity(), Pretrained.find(base).tokenizer(), base)
