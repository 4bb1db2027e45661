"""What DRO needs to know of questions and networks, be they facts of a generated world, passages or texts.

A question is known by its number within its split (``labelled``, ``train``, ``dev``, ``test``). An order, the latent,
is whatever a source's own networks make of it, as JSON; the loop, the arms and the report never look into one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mobula.alternation import Row
from mobula.errors import MobulaError
from mobula.experiment import DataFacts
from mobula.rag.dro.pair import Pair
from mobula.training.task import Task

SPLITS = ("labelled", "train", "dev", "test")
# How the passages of an answer are chosen: by the selector, as the retriever ranks them, those that are shown first,
# those that are known to support the answer, others, every candidate, or none at all.
SELECTIONS = ("selector", "retriever", "first", "gold", "no_gold", "each", "none")
# What is shown of every iteration's samples, weights and trainings.
WEIGHED = ("sample_em", "ess", "bound", "all_fail", "unique", "skipped", "entropy", "gap_selector", "gap_generator")
Order = Any
# Values f64[N] by name, one a question; NaN where a measure does not apply to it, 0 where it failed.
Measured = dict[str, np.ndarray]


class NotEnumerable(MobulaError):
    """Orders of a source that only samples them were asked for one by one."""


@dataclass(frozen=True)
class Judged:
    """What the generator makes of a question after each of m orders.

    ``log_lik``: log p(y|x,d_z) of the gold answer, summed over its ``tokens`` tokens. ``right`` and ``reward``: exact
    match and F1 of the generator's own answer.
    """

    log_lik: list[float]
    right: list[float]
    reward: list[float]
    tokens: int = 1


class OrdersTask(Task):
    """A training of a selector or a generator on weighted orders.

    ``tokens``: the learned tokens of a row, by which its loss is divided.
    """

    @property
    @abstractmethod
    def tokens(self) -> float: ...

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """One loss, linear in the batch's ``weights``."""


class Networks(Protocol):
    """Selector and generator, opened."""

    def sample(self, split: str, queries: Sequence[int], samples: int, seeds: Sequence[int]) -> list[Row]:
        """Orders drawn from the selector, a row ``{orders}`` each; a row depends on its question and seed alone.

        Where orders are read from free text, ``valid`` says how many passages of each were named there.
        """

    def choose(self, split: str, queries: Sequence[int], how: str) -> list[Order]:
        """One order a question by one of :data:`SELECTIONS`; the selector's is greedy."""

    def judge(self, split: str, queries: Sequence[int], orders: Sequence[Sequence[Order]]) -> list[Judged]:
        """What the generator makes of every question after each of its orders."""

    def measure(self, split: str, queries: Sequence[int], how: str) -> Measured:
        """Select, answer and compare with what is right; greedy."""

    def exact(self, split: str, queries: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log p(z|x) and log p(y|x,d_z) f64[N, Z] of all orders.

        Raises:
            NotEnumerable: by a source whose ``enumerable`` is false.
        """


@dataclass(frozen=True)
class Wording:
    """How a source's results are told.

    ``measures``: what is measured of test questions, with its title and scale. ``compared``: those that claims are
    about. ``plotted`` and ``shown``: columns of an iteration's row, with the label of a plot's axis.
    """

    header: str
    measures: Mapping[str, tuple[str, float]]
    compared: Sequence[str]
    plotted: Mapping[str, str]
    shown: Sequence[str]


class Source(Protocol):
    """Questions, and the kinds of network that choose and answer. Picklable; what is slow to open is opened on use.

    ``artifact``: the kind of artifact it leaves. ``enumerable``: all orders of a question can be listed. ``views``:
    selections that test questions are answered with beside the selector's own.
    """

    @property
    def artifact(self) -> str: ...
    @property
    def enumerable(self) -> bool: ...
    @property
    def views(self) -> Sequence[str]: ...
    @property
    def wording(self) -> Wording: ...

    def prepare(self) -> DataFacts:
        """Read the data and make what all arms and seeds share, once; what the data are."""

    def queries(self, split: str) -> list[int]:
        """The questions of a split; of those to learn from, only ones that can be learned from."""

    def orders(self) -> list[Order]:
        """All orders of a question, as :meth:`Networks.exact` counts them.

        Raises:
            NotEnumerable: by a source whose ``enumerable`` is false.
        """

    def fresh(self, kind: str, directory: Path, seed: int) -> Path | None:
        """Weights that a ``selector`` or ``generator`` begins its cold start with; None: drawn from the seed."""

    def labels(self, kind: str, seed: int) -> list[Row]:
        """What a network of this kind learns from in the cold start: rows ``{query, orders, weights}``."""

    def task(self, kind: str, split: str, rows: Path, start: Path | None, seed: int) -> OrdersTask:
        """Train a network on weighted orders, rows ``{query, orders, weights}`` of a file."""

    def open(self, pair: Pair) -> Networks:
        """Open both networks."""

    def export(self, folder: Path, pair: Pair) -> None:
        """Write what answers questions into the folder of an artifact."""

    def meta(self) -> dict[str, Any]:
        """What the artifact's manifest says of it."""
