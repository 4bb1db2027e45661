"""What all pretrained language models have in common as docid networks: docid tokens, training, saving.

A docid's codes become new tokens ``<d_l_k>``, one for each level and code, whose rows start at the mean pretrained
row (spec 3.2). The output layer is replaced by one that holds the rows of these tokens alone, level by level, so
neither a word nor [MASK] can ever be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mobula.errors import ModelError
from mobula.models.lora import add_lora, leave_out_frozen
from mobula.retrieval.network import DocidModel, NetworkKind


@dataclass(frozen=True)
class PretrainedShape:
    """What fixes a docid model on a pretrained language model; stored with its weights.

    ``base`` is the Hugging Face id or folder of the pretrained model, ``base_hash`` the hash of its files.
    """

    backbone: str
    base: str
    base_hash: str
    paradigm: NetworkKind
    sizes: tuple[int, ...]
    finetune: bool
    lora_rank: int
    lora_alpha: float


class DocidRows(nn.Module):
    """Input embeddings f32[L*K, d] of the docid tokens; at the start all are the mean row of ``table`` f32[V, d]."""

    def __init__(self, table: Tensor, levels: int, codes: int) -> None:
        super().__init__()
        self.codes = codes
        self.weight = nn.Parameter(_mean_rows(table, levels * codes))

    def forward(self, z: Tensor, levels: Tensor) -> Tensor:
        """Rows [..., l, d] for codes z [..., l] (at least 0) that stand at ``levels`` [l]."""
        return F.embedding(z + levels * self.codes, self.weight)


class DocidHead(nn.Module):
    """Output rows f32[L*K, d] of the docid tokens, in place of a language model's output layer.

    ``rows`` are the input rows where the pretrained model ties both matrices. ``shift`` is 1 for a model whose state
    at a position predicts the token after it, else 0: this is the one place where logits are shifted.
    """

    bias = None  # transformers reads it when an output layer is replaced

    def __init__(self, rows: nn.Parameter, levels: int, shift: int = 0) -> None:
        super().__init__()
        self.levels, self.shift = levels, shift
        self.weight = rows

    def forward(self, hidden: Tensor, levels: slice = slice(None)) -> Tensor:
        """Logits [R, l, K] of ``levels``, which stand at the end of the sequence hidden [R, S, d]."""
        weight = self.weight.unflatten(0, (self.levels, -1))[levels]
        end = hidden.shape[1] - self.shift
        states = hidden[:, end - len(weight) : end]
        return (states.transpose(0, 1) @ weight.transpose(-1, -2)).transpose(0, 1)


class LanguageModel(DocidModel):
    """A docid model whose network is a pretrained language model.

    Trained are the docid tokens' rows and either all pretrained weights (``finetune``) or LoRA on every linear layer.
    Weights that stay frozen are no part of ``state_dict``: they are read from the base model again.
    """

    learned: ClassVar[NetworkKind]  # what the pretrained model has learned to do
    continued: ClassVar[bool]  # whether the docid follows the prompt in one sequence
    shape: PretrainedShape
    rows: DocidRows
    head: DocidHead

    def add_tokens(self, table: Tensor, output: Tensor, *, shift: int = 0) -> None:
        """Make the docid tokens' rows from the input and output matrices [V, d] of the pretrained model."""
        self.rows = DocidRows(table, self.levels, self.width)
        tied = output is table
        weight = self.rows.weight if tied else nn.Parameter(_mean_rows(output, self.levels * self.width))
        self.head = DocidHead(weight, self.levels, shift)

    def adapt(self, *parts: nn.Module) -> None:
        """Choose what is trained of the pretrained ``parts``, and leave the rest out of ``state_dict``."""
        if not self.shape.finetune:
            add_lora(*parts, rank=self.shape.lora_rank, alpha=self.shape.lora_alpha)
        else:
            for part in parts:
                part.requires_grad_(True)
        for row in self._docid_rows():
            row.requires_grad_(True)
        if next(self.pretrained(), None) is None:
            raise ModelError(f"model {self.shape.base!r} has no linear layer for LoRA; set model.finetune=true")
        leave_out_frozen(self)

    def pretrained(self) -> Iterator[nn.Parameter]:
        """Weights that are trained besides the docid tokens' rows."""
        rows = {id(row) for row in self._docid_rows()}
        return (p for p in self.parameters() if p.requires_grad and id(p) not in rows)

    def _docid_rows(self) -> list[nn.Parameter]:
        return [self.rows.weight, self.head.weight]


def _mean_rows(table: Tensor, count: int) -> Tensor:
    return table.detach().float().mean(0).expand(count, -1).clone()
