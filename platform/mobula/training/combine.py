"""Several losses of one training: how they count in a step, and how their gradients become one.

PCGrad (gradient surgery; Yu et al. 2020, arXiv 2001.06782, algorithm 1) works on the gradients of the global batch:
a loss's gradient is complete, over all micro-batches and ranks, before it is projected.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mobula.errors import TrainingError

# What a micro-batch's mean is multiplied by, so that the average over micro-batches and ranks is the weighted mean.
Scale = float | dict[str, float]


def scale_of(weights: Tensor | Mapping[str, Tensor], part: slice) -> Scale:
    """How much the mean over ``part`` of a batch counts in the mean over all of it, per share of the examples.

    ``weights`` (f[B], or one for each loss) are those of the batch's examples. Exactly 1 if the part is the batch, or
    its examples weigh as much as others do; 0 if they weigh nothing.
    """
    if not isinstance(weights, Tensor):
        return {name: _scale_of(each, part) for name, each in weights.items()}
    return _scale_of(weights, part)


def _scale_of(weights: Tensor, part: slice) -> float:
    total, own = float(weights.double().sum()), weights[part]
    return (float(own.double().sum()) / total) / (len(own) / len(weights)) if total else 0.0


def scaled(loss: Tensor | Mapping[str, Tensor], scale: Scale) -> dict[str, Tensor]:
    """Losses by name, times their scales; a single loss has an empty name.

    One whose scale is 0 is the constant 0, whatever its value: a mean over no token is NaN. The constant has no graph.

    Raises:
        TrainingError: losses and scales have different names.
    """
    losses = {"": loss} if isinstance(loss, Tensor) else dict(loss)
    scales = scale if isinstance(scale, dict) else dict.fromkeys(losses, scale)
    missing = [name for name, value in scales.items() if value and name not in losses]
    unknown = [name for name in losses if name not in scales]
    if missing or unknown:
        raise TrainingError(
            f"the task's loss returns {_listed(losses)} and its weights are for {_listed(scales)}: one weight for "
            "every loss is expected"
        )
    device = next(iter(losses.values())).device if losses else None
    return {name: losses[name] * value if value else torch.zeros((), device=device) for name, value in scales.items()}


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the losses, in their order."""
    return functools.reduce(operator.add, losses.values())


def surrogate(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient at ``parameters`` is ``gradients``: the sum of <parameter, gradient>."""
    return torch.stack([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()


def pcgrad(gram: Tensor, rng: torch.Generator) -> Tensor:
    """PCGrad's combined gradient as weights f64[K] of the K losses' gradients.

    ``gram`` f64[K, K] holds the gradients' inner products, which are all that the projections need: each loss's
    gradient is projected onto the normal plane of every other's that it then conflicts with (inner product below 0),
    in the order of one ``torch.randperm`` for each loss, and the results are added up.
    """
    rows = torch.eye(len(gram), dtype=gram.dtype)
    for i, row in enumerate(rows):
        for j in torch.randperm(len(gram), generator=rng).tolist():
            product = row @ gram[:, j]
            if j != i and product < 0:
                row[j] -= product / gram[j, j]
    return rows.sum(0)


class LossGradients:
    """The gradients of several losses in fp32, accumulated over a step: one row for each, f32[K, trained weights]."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self._names: list[str] = []
        self._rows = torch.empty(0)

    def add(self, losses: Mapping[str, Tensor], share: float) -> None:
        """Add ``share`` of the gradients of a micro-batch's losses (scalars); the same names every time, on all ranks.

        Raises:
            TrainingError: there is one loss alone, or the names differ.
        """
        if not self._names:
            self._open(list(losses))
        if losses.keys() != set(self._names):
            raise TrainingError(f"the task's losses were {_listed(self._names)} and are now {_listed(losses)}")
        for name, row in zip(self._names, self._rows, strict=True):
            if not losses[name].requires_grad:
                continue
            gradients = torch.autograd.grad(losses[name], self._parameters, retain_graph=True, allow_unused=True)
            for view, gradient in zip(row.split(self._sizes), gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient.flatten(), alpha=share)

    def combine(self, seed: int) -> tuple[list[Tensor], dict[str, Tensor | float]]:
        """PCGrad's gradient of every parameter from the averages over all ranks; then accumulation starts anew.

        ``seed`` decides the order of projections. Also returns the share of the pairs of losses that conflict
        (``conflicts``) and the mean cosine of pairs (``cosine``; 0 for a gradient that is zero).
        """
        rows = self._rows
        if dist.get_world_size() > 1:
            dist.all_reduce(rows)
            rows /= dist.get_world_size()
        gram = (rows @ rows.T).double().cpu()
        weights = pcgrad(gram, torch.Generator().manual_seed(seed))
        parts = (weights.to(rows) @ rows).split(self._sizes)
        rows.zero_()
        one, other = torch.triu_indices(len(gram), len(gram), offset=1)
        norms = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        cosines = gram[one, other] / (norms[one] * norms[other])
        values: dict[str, Tensor | float] = {"conflicts": (cosines < 0).float().mean(), "cosine": cosines.mean()}
        return [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)], values

    def _open(self, names: list[str]) -> None:
        if len(names) < 2:
            raise TrainingError("combine=pcgrad combines several named losses; the task returns a single one: use sum")
        everyone: list[list[str]] = [names] * dist.get_world_size()
        if len(everyone) > 1:
            dist.all_gather_object(everyone, names)
        if any(others != names for others in everyone):
            raise TrainingError(f"the task's losses differ among ranks: {'; '.join(map(_listed, everyone))}")
        self._names = names
        self._rows = torch.zeros(len(names), sum(self._sizes), device=self._parameters[0].device)


def _listed(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(name or "a single loss" for name in names)
