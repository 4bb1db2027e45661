"""What is trained: the one thing a method writes for the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mobula.portable import Portable


class Task(Portable, ABC):
    """A model, its data and its loss.

    A task travels to every worker, so it is picklable and holds paths instead of large arrays; whatever is
    slow to open is a ``cached_property`` and stays behind. Its methods are deterministic: the loop seeds torch before
    each call, and ``batch`` draws from the generator that it is given and from nothing else.
    """

    @property
    @abstractmethod
    def examples(self) -> int:
        """Number of training examples."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model to train, on CPU in fp32. Every parameter has at least one dimension.

        A parameter with an attribute ``lr_scale`` trains at that share of the learning rate.
        Under ZeRO-3 a large weight may be used only inside the forward pass of the module that owns it.
        """

    @abstractmethod
    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The examples ``indices`` (i64[B]) as tensors on CPU; noise, masks and negatives come from ``generator``."""

    def weights(self, indices: Tensor) -> Tensor | dict[str, Tensor]:
        """Weights (f[B] or i64[B], at least 0) of the examples ``indices`` in a mean over them; all alike by default.

        A loss that is a mean over tokens says here how many each example has, or short examples would count as much
        as long ones wherever a step has several micro-batches. Means that differ in what they are over are named
        losses, with one such tensor for each name; their further values stay means over examples.
        """
        return torch.ones(len(indices))

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Tensor]
    ) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor | float]]:
        """The loss (scalar), or several losses by name, and further values to log.

        All are means over the batch, weighted by :meth:`weights`; the loop makes them means over the step's batch, on
        all micro-batches and ranks. Named losses are logged, and combined as ``combine`` says: by default they are
        added up. A named loss may be left out of a micro-batch in which all its weights are 0.
        """

    @abstractmethod
    def identity(self) -> str:
        """Names everything about the task that decides the result: data, model, loss."""

    def reference(self, model: Any) -> dict[str, Tensor]:
        """What the loss needs to know of the model before its first step (log-probabilities of a reference policy).

        The loop asks once, as it does :meth:`evaluate`, at the training's own precision; it stores the tensors with
        the training and hands them to :meth:`refer` before the first batch, on every rank and after a resumption.
        """
        return {}

    def refer(self, references: dict[str, Tensor]) -> None:
        """Take what :meth:`reference` computed, on CPU; the task keeps it for :meth:`batch`."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics on the dev split; none by default. The model is in evaluation mode and gradients are off."""
        return {}

    def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
        """Look at the metrics of :meth:`evaluate` after ``step`` of ``steps`` steps, on every rank.

        Raises:
            TrainingError: if going on would be a waste (the model has collapsed, say).
        """
