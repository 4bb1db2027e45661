"""Direct preference optimisation of the planner (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

Sums over plan tokens and EOS; the reference is the planner at the start of the iteration, whose log-probabilities are
computed once, when the pairs are made, and stored with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.models.finetune import FinetuneTask, TokenRow, collate, row_log_probs


@dataclass(frozen=True)
class Preference:
    """A pair of plans of one prompt, as token ids with EOS, and log-probabilities of both under the reference."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    ref_chosen: float
    ref_rejected: float


def write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    """Write pairs as JSON lines."""
    write_jsonl(path, (asdict(preference) for preference in preferences))


def read_preferences(path: Path) -> list[Preference]:
    """What :func:`write_preferences` wrote."""
    return [_preference(row) for row in read_jsonl(path)]


def _preference(row: dict[str, Any]) -> Preference:
    prompt, chosen, rejected = (tuple(row[name]) for name in ("prompt", "chosen", "rejected"))
    return Preference(prompt, chosen, rejected, row["ref_chosen"], row["ref_rejected"])


@dataclass
class DpoTask(FinetuneTask):
    """Tune the model saved in ``start`` on the preferences in ``data``.

    ``beta`` is the weight of the pull towards the reference, ``chosen_nll`` (lambda; 0 in the paper) that of the mean
    negative log-likelihood of a chosen plan's token, which keeps chosen plans likely.
    """

    beta: float = 0.2
    chosen_nll: float = 0.0

    def read(self, line: Any) -> Preference:
        """A pair of plans."""
        return _preference(line)

    def rows(self, example: Preference) -> Sequence[TokenRow]:
        """The chosen plan and the rejected one."""
        return [TokenRow.of(example.prompt, plan) for plan in (example.chosen, example.rejected)]

    def build(self) -> nn.Module:
        """The planner to start with, without dropout: the reference has none either."""
        network = super().build()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return network

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Chosen plans above their rejected ones: ids, attention, mask [2B, n]; the reference's sums f32[B] of both."""
        pairs = [self.items[i] for i in indices.tolist()]
        chosen, rejected = zip(*map(self.rows, pairs), strict=True)
        return {
            **collate([*chosen, *rejected]),
            "ref_chosen": torch.tensor([p.ref_chosen for p in pairs]),
            "ref_rejected": torch.tensor([p.ref_rejected for p in pairs]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean of -log sigmoid(beta * margin) + lambda * nll of the chosen plan, in nats.

        Logged: ``preferred``, the share of pairs with a positive margin; ``chosen_shift``, how much likelier the
        chosen plans have become since the reference (negative: likelihood displacement); ``margin``.
        """
        chosen, rejected = row_log_probs(model, batch).chunk(2)
        shift, fall = chosen - batch["ref_chosen"], rejected - batch["ref_rejected"]
        margin = shift - fall
        tokens = (batch["mask"].chunk(2)[0] > 0).sum(1)
        loss = -F.logsigmoid(self.beta * margin) - self.chosen_nll * chosen / tokens
        facts: dict[str, Tensor | float] = {
            "preferred": (margin > 0).float().mean(),
            "chosen_shift": shift.mean().detach(),
            "margin": margin.mean().detach(),
        }
        return loss.mean(), facts
