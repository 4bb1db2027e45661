"""Direct preference optimisation of a causal language model (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

::

    margin = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    L = mean of -log sigmoid(beta * margin) - lambda * log pi(y_w|x) / |y_w|

log pi is the sum over the tokens of a continuation and EOS; pi_ref is the model before its first step, scored by the
trainer at the training's precision, so that the margin begins at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.models.finetune import FinetuneTask, TokenRow, row_log_probs, without_dropout

REFERENCE_BATCH = 32  # pairs


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, as token ids that end with EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class DpoTask(FinetuneTask):
    """Tune the model saved in ``start``, which is the reference as well, on the preferences in ``data``.

    ``beta`` is the weight of the pull towards the reference, ``chosen_nll`` (lambda; 0 in the paper) that of the mean
    negative log-likelihood of a chosen continuation's token, which keeps what is chosen likely.
    """

    beta: float = 0.2
    chosen_nll: float = 0.0

    def read(self, line: Any) -> Preference:
        """A pair."""
        return Preference(**line)

    def rows(self, example: Preference) -> Sequence[TokenRow]:
        """The chosen continuation and the rejected one."""
        return [TokenRow.of(example.prompt, target) for target in (example.chosen, example.rejected)]

    def build(self) -> nn.Module:
        """The network to start with, without dropout: the reference has none either."""
        return without_dropout(super().build())

    def reference(self, model: nn.Module) -> dict[str, Tensor]:
        """log pi_ref of both continuations of every pair, f32[P, 2]."""
        device, log_probs = next(model.parameters()).device, []
        for indices in torch.arange(self.examples).split(REFERENCE_BATCH):
            batch = super().batch(indices, torch.Generator())
            log_probs.append(_log_probs(model, {name: part.to(device) for name, part in batch.items()}))
        return {"log_probs": torch.cat(log_probs)}

    def refer(self, references: dict[str, Tensor]) -> None:
        """Keep the reference's log-probabilities."""
        self._reference = references["log_probs"]

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Every chosen continuation above its rejected one, as :func:`.collate`; ``reference`` f32[B, 2]."""
        return {**super().batch(indices, generator), "reference": self._reference[indices]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean of -log sigmoid(beta * margin) + lambda * nll of the chosen continuation, in nats.

        Logged: ``preferred``, the share of pairs with a positive margin; ``chosen_shift``, how much likelier
        what is chosen has become since the reference (negative: likelihood displacement); ``margin``.
        """
        log_probs = _log_probs(model, batch)
        shift, fall = (log_probs - batch["reference"]).unbind(1)
        margin = shift - fall
        tokens = (batch["mask"][::2] > 0).sum(1)
        loss = -F.logsigmoid(self.beta * margin) - self.chosen_nll * log_probs[:, 0] / tokens
        facts: dict[str, Tensor | float] = {
            "preferred": (margin > 0).float().mean(),
            "chosen_shift": shift.mean().detach(),
            "margin": margin.mean().detach(),
        }
        return loss.mean(), facts


def _log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi f32[B, 2] of both continuations of every pair of a batch."""
    return row_log_probs(model, batch).view(-1, 2)
