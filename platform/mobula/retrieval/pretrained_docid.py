"""What all pretrained language models have in common as docid networks: docid tokens, training, saving.

A docid's codes become new tokens ``<d_l_k>``, one for each level and code, whose rows start at the mean pretrained
row (spec 3.2); a code of a text docid names a word, and starts at the mean of that word's rows. The output layer is
replaced by one that holds the rows of these tokens alone, level by level, so neither a word nor [MASK] can ever be
predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.models.adapters import ALL_LINEAR, LoraConfig, add_lora
from mobula.models.frozen import leave_out_frozen
from mobula.models.pretrained import Pretrained
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
    lora_targets: Any = ALL_LINEAR  # as of LoraConfig

    @property
    def lora(self) -> LoraConfig:
        """The low-rank parts."""
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_targets)


class DocidRows(nn.Module):
    """Input embeddings f32[L*K, d] of the docid tokens, which start at ``rows``; ``codes`` is K."""

    def __init__(self, rows: Tensor, codes: int) -> None:
        super().__init__()
        self.codes = codes
        self.weight = nn.Parameter(rows)

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


class PretrainedDocidModel(DocidModel):
    """A docid model whose network is a pretrained language model.

    Trained are the docid tokens' rows and either all pretrained weights (``finetune``) or LoRA on linear layers.
    Weights that stay frozen are no part of ``state_dict``: they are read from the base model again.
    """

    learned: ClassVar[NetworkKind]  # what the pretrained model has learned to do
    continued: ClassVar[bool]  # whether the docid follows the prompt in one sequence
    shape: PretrainedShape
    rows: DocidRows
    head: DocidHead

    def add_tokens(self, table: Tensor, output: Tensor, words: Sequence[Sequence[int]], *, shift: int = 0) -> None:
        """Make the docid tokens' rows from the input and output matrices [V, d] of the pretrained model.

        ``words`` are the pretrained tokens of the word that each code names, see :func:`tokens_of_words`.
        """
        self.rows = DocidRows(starting_rows(table, words, self.levels, self.width), self.width)
        tied = output is table
        weight = self.rows.weight
        if not tied:
            weight = nn.Parameter(starting_rows(output, words, self.levels, self.width))
        self.head = DocidHead(weight, self.levels, shift)

    def adapt(self, *parts: nn.Module) -> None:
        """Choose what is trained of the pretrained ``parts``, and leave the rest out of ``state_dict``.

        Raises:
            ModelError: as :func:`add_lora`.
        """
        if not self.shape.finetune:
            add_lora(*parts, lora=self.shape.lora)
        else:
            for part in parts:
                part.requires_grad_(True)
        for row in self._docid_rows():
            row.requires_grad_(True)
        leave_out_frozen(self)

    def pretrained(self) -> Iterator[nn.Parameter]:
        """Weights that are trained besides the docid tokens' rows."""
        rows = {id(row) for row in self._docid_rows()}
        return (p for p in self.parameters() if p.requires_grad and id(p) not in rows)

    def _docid_rows(self) -> list[nn.Parameter]:
        return [self.rows.weight, self.head.weight]


@dataclass
class HypothesisCache:
    """Keys and values of G = ``width`` hypotheses a query after ``position`` codes: tensors [R, ...] per layer."""

    layers: Sequence[tuple[Tensor, ...]]
    position: int
    width: int

    def reorder(self, parents: Tensor) -> HypothesisCache:
        """The state of hypotheses that continue ``parents`` i64[B, G'] of the present ones."""
        starts = torch.arange(parents.shape[0], device=parents.device) * self.width
        rows = (starts.unsqueeze(1) + parents).flatten()
        kept = [tuple(tensor[rows] for tensor in layer) for layer in self.layers]
        return HypothesisCache(kept, self.position, parents.shape[1])


def tokens_of_words(base: Pretrained, words: Sequence[str] | None) -> list[list[int]]:
    """The tokens of ``base`` that spell the word of each code; none where a code has no word or ``base`` cannot."""
    if not words:
        return []
    tokenizer = base.tokenizer()
    spelled = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    return [[] if tokenizer.unk_token_id in ids else ids for ids in spelled]


def starting_rows(table: Tensor, words: Sequence[Sequence[int]], levels: int, codes: int) -> Tensor:
    """Rows f32[L*K, d] for a pretrained matrix [V, d]: the mean over a code's word, or over all tokens without one."""
    table = table.detach().float()
    rows = table.mean(0).repeat(codes, 1)
    for code, tokens in enumerate(words):
        if tokens:
            rows[code] = table[list(tokens)].mean(0)
    return rows.repeat(levels, 1)
