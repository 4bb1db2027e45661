"""Fine-tuning a causal language model on rows of tokens that are learned in part: rows, batches, and saving.

A method's task says which loss its rows have; what they share is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobula.cluster.spec import ClusterSpec
from mobula.models.causal import CausalModel
from mobula.training import FitResult, Task, TrainingConfig, fit, load_weights

MODEL = "model"


@dataclass(frozen=True)
class TokenRow:
    """Token ids with a mask, 0 where a token is not learned (the method says what other values mean), and a weight.

    ``old``: log-probabilities of the tokens under the model that sampled them, where a ratio to it is learned.
    """

    ids: list[int]
    mask: list[int]
    weight: float
    old: list[float] | None = None


def collate(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Rows padded on the right: ``ids``, ``mask``, ``real`` i64[R, n], ``old`` f32[R, n], ``weights`` f32[R]."""
    length = max(len(row.ids) for row in rows)
    ids, mask, real = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    old = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end], mask[i, :end], real[i, :end] = torch.tensor(row.ids), torch.tensor(row.mask), 1
        if row.old is not None:
            old[i, :end] = torch.tensor(row.old)
    weights = torch.tensor([row.weight for row in rows])
    return {"ids": ids, "mask": mask, "real": real, "old": old, "weights": weights}


def token_log_probs(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """log p f32[R, n - 1] of every token but the first, given those before it."""
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


class FineTuningTask(Task):
    """A task whose network is that of the model saved in ``start``."""

    start: Path

    def build(self) -> nn.Module:
        """The network to start with."""
        return CausalModel.open(str(self.start)).network.train()


def finetune(
    task: FineTuningTask, config: TrainingConfig, directory: Path, seed: int, name: str, cluster: ClusterSpec | None
) -> FitResult:
    """Train from the model that the task starts with, and save the result in ``directory/model``."""
    result = fit(task, config, directory / "fit", seed=seed % 2**31, name=name, cluster=cluster)
    model = CausalModel.open(str(task.start))
    load_weights(model.network, result.weights)
    model.save(directory / MODEL)
    return result
