"""A selector and a generator that stand together, and what can be said of them with all orders enumerated."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.artifacts import sha256, write_json
from mobula.config import digest
from mobula.errors import MobulaError
from mobula.rag.dro.networks import Shape
from mobula.rag.dro.training import of_answers, open_network
from mobula.rag.dro.world import ORDERS, Questions

STATE = "state.json"
BATCH = 250


class SnapshotMismatch(MobulaError):
    """Samples or scores of other networks than those that stand."""


@dataclass(frozen=True)
class Pair:
    """The weights of both networks, and their sizes."""

    selector: Path
    generator: Path
    selector_shape: Shape
    generator_shape: Shape

    @cached_property
    def snapshot(self) -> str:
        """Identity of the weights of both."""
        return digest([sha256(self.selector), sha256(self.generator)])[:16]

    @cached_property
    def networks(self) -> tuple[Any, Any]:
        """Selector and generator, opened."""
        selector = open_network("selector", self.selector_shape, self.selector, 0)
        generator = open_network("generator", self.generator_shape, self.generator, 0)
        return selector.eval(), generator.eval()

    @torch.inference_mode()
    def log_prior(self, questions: Questions) -> Tensor:
        """log p(z|x) [N, 30] of every order."""
        parts = (questions[rows] for rows in torch.arange(len(questions)).split(BATCH))
        return torch.cat([self.networks[0](part.asked, part.facts).sum(-1) for part in parts]).double()

    def log_lik(self, questions: Questions) -> Tensor:
        """log p(y|x,d_z) [N, 30] of every order."""
        return self.judged(questions, torch.arange(len(ORDERS)).expand(len(questions), -1))[0]

    @torch.inference_mode()
    def judged(self, questions: Questions, orders: Tensor) -> tuple[Tensor, Tensor]:
        """log p(y|x,d_z) [N, m] after orders i64[N, m], and whether the likeliest answer is the gold one."""
        scores, right = [], []
        for rows in torch.arange(len(questions)).split(BATCH):
            part = questions[rows]
            said = self.networks[1](part.asked, part.context(orders[rows]))
            scores.append(of_answers(said, part.answers))
            right.append(said.argmax(-1) == part.answers.unsqueeze(-1))
        return torch.cat(scores).double(), torch.cat(right)

    @torch.inference_mode()
    def predict(self, questions: Questions, orders: Tensor) -> Tensor:
        """The likeliest answer i64[N] after one order i64[N] each."""
        context = questions.context(orders.unsqueeze(1))
        return self.networks[1](questions.asked, context).squeeze(1).argmax(-1)

    def write(self, directory: Path) -> None:
        """Name the weights in a phase's directory, with relative paths, so a run can be moved."""
        paths = {name: getattr(self, name).resolve() for name in ("selector", "generator")}
        write_json(directory / STATE, {n: os.path.relpath(p, directory.resolve()) for n, p in paths.items()})

    @classmethod
    def read(cls, directory: Path, selector_shape: Shape, generator_shape: Shape) -> Pair:
        """What :meth:`write` wrote."""
        row = json.loads((directory / STATE).read_text())
        selector, generator = ((directory / row[name]).resolve() for name in ("selector", "generator"))
        return cls(selector, generator, selector_shape, generator_shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("selector", "generator", "selector_shape", "generator_shape")}


@dataclass(frozen=True)
class Measured:
    """What a pair does with questions: exact match and whether both gold facts were chosen, by question."""

    exact: np.ndarray
    gold: np.ndarray
    log_p: np.ndarray


def measure(pair: Pair, questions: Questions) -> Measured:
    """Greedy: the likeliest of all orders, the likeliest answer; and the exact log p(y|x)."""
    log_prior = pair.log_prior(questions)
    best = log_prior.argmax(-1)
    right = pair.predict(questions, best) == questions.answers
    gold = ORDERS[best].sort(-1).values == ORDERS[questions.gold].sort(-1).values
    log_p = torch.logsumexp(log_prior + pair.log_lik(questions), -1)
    return Measured(right.double().numpy(), gold.all(-1).double().numpy(), log_p.numpy())
