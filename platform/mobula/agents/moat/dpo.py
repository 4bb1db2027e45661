"""Direct preference optimisation of the planner (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

::

    margin = [log pi(s_w|x) - log pi_ref(s_w|x)] - [log pi(s_l|x) - log pi_ref(s_l|x)]
    L = mean of -log sigmoid(beta * margin) - lambda * log pi(s_w|x) / |s_w|

log pi is the sum over plan tokens and EOS; pi_ref is the planner at the start of the iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import digest
from mobula.models.causal import CausalModel
from mobula.models.sft import collate, target_log_probs
from mobula.training import Task


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
    """Read pairs that :func:`write_preferences` wrote."""
    return [
        Preference(tuple(r["prompt"]), tuple(r["chosen"]), tuple(r["rejected"]), r["ref_chosen"], r["ref_rejected"])
        for r in read_jsonl(path)
    ]


@dataclass
class DpoTask(Task):
    """Tune the model saved in ``start``, which is the reference as well, on the preferences in ``data``.

    ``beta`` is the weight of the pull towards the reference, ``chosen_nll`` (lambda; 0 in the paper) that of the mean
    negative log-likelihood of a chosen plan's token, which keeps chosen plans likely.
    """

    start: Path
    data: Path
    beta: float = 0.2
    chosen_nll: float = 0.0

    @cached_property
    def preferences(self) -> list[Preference]:
        """The pairs."""
        return read_preferences(self.data)

    @property
    def examples(self) -> int:
        """Number of pairs."""
        return len(self.preferences)

    @property
    def target_tokens(self) -> int:
        """Tokens of both sides that one pass over the data learns from, EOS included."""
        return sum(len(p.chosen) + len(p.rejected) for p in self.preferences)

    def identity(self) -> str:
        """The start's files, the data and both weights."""
        files = {path.name: sha256(path) for path in sorted(self.start.iterdir()) if path.is_file()}
        return digest([files, sha256(self.data), self.beta, self.chosen_nll])

    def build(self) -> nn.Module:
        """The planner to start with, without dropout: the reference has none either."""
        network = CausalModel.open(str(self.start)).network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return network

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Chosen plans above their rejected ones: ids, mask, labels [2B, n]; the reference's sums f32[B] of both."""
        pairs = [self.preferences[i] for i in indices.tolist()]
        chosen = [(list(p.prompt), list(p.chosen)) for p in pairs]
        rejected = [(list(p.prompt), list(p.rejected)) for p in pairs]
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
        chosen, rejected = target_log_probs(model, batch).chunk(2)
        shift, fall = chosen - batch["ref_chosen"], rejected - batch["ref_rejected"]
        margin = shift - fall
        tokens = (batch["labels"].chunk(2)[0] >= 0).sum(1)
        loss = -F.logsigmoid(self.beta * margin) - self.chosen_nll * chosen / tokens
        facts: dict[str, Tensor | float] = {
            "preferred": (margin > 0).float().mean(),
            "chosen_shift": shift.mean().detach(),
            "margin": margin.mean().detach(),
        }
        return loss.mean(), facts
