"""Docid networks on pretrained masked-diffusion (LLaDA, Dream, MDLM) and masked language models.

The sequence is the prompt, padded on the left, followed by the docid: ``query: {q}\\ndocid:<d_1_7>[MASK]<d_3_0>...``.
Every position attends to every other, as these models were pretrained, so the query's states change with the docid
and nothing of the network can be cached: :class:`Memory` holds the embedded prompt.

Shapes: B queries, G hypotheses a query, n prompt positions, L levels, K codes, S = n + L, d width of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mobula.errors import ModelError
from mobula.models.pretrained import Pretrained
from mobula.retrieval.network import Memory, NetworkKind, required
from mobula.retrieval.pretrained_docid import PretrainedDocidModel, PretrainedShape, tokens_of_words
from mobula.retrieval.remote_code import PaddingMask, load_published

PADDING_TOLERANCE = 1e-3  # effect of padding on logits, as a share of the effect of a docid token


@dataclass(frozen=True)
class Kind:
    """How a family of models is opened and read.

    ``loader`` is the transformers class, ``ids`` what its configuration must have, ``mask`` the id of [MASK] (None:
    the tokenizer's), ``shift`` as in :class:`.DocidHead`. ``published``: opened by its own code. ``padding``: how
    attention is told of it, by i64[B, S], by bool[B, 1, 1, S], or around the network by :class:`.PaddingMask`.
    """

    loader: str
    ids: dict[str, int] = field(default_factory=dict)
    mask: int | None = None
    shift: int = 0
    published: bool = False
    padding: Literal["mask", "square", "around"] = "mask"


KINDS = {
    "llada": Kind(
        "AutoModel",
        {"mask_token_id": 126336, "eos_token_id": 126081},
        mask=126336,
        published=True,
        padding="around",
    ),
    "dream": Kind("AutoModel", {"mask_token_id": 151666}, mask=151666, shift=1, published=True, padding="square"),
    # Its vocabulary is that of GPT-2 with [MASK] behind it.
    "mdlm": Kind("AutoModelForMaskedLM", {"vocab_size": 50258}, mask=50257, published=True, padding="around"),
    "masked_lm": Kind("AutoModelForMaskedLM"),
}


class DiffusionLM(PretrainedDocidModel):
    """Logits over docid tokens from a language model that fills in [MASK]."""

    learned: ClassVar[NetworkKind] = "diffusion"
    continued: ClassVar[bool] = True

    def __init__(self, shape: PretrainedShape, base: Pretrained, words: Sequence[str] | None = None) -> None:
        """Load ``base`` and give it docid tokens, which start at ``words`` where codes name some.

        Raises:
            ModelError: if it is of another kind, its token ids are not those of its kind, it has no mask token or no
                output layer, its attention is causal, or it does not mask padding.
        """
        super().__init__(shape)
        self.kind = KINDS[shape.backbone]
        if base.has_own_code != self.kind.published:
            kinds = [name for name, kind in KINDS.items() if kind.published == base.has_own_code]
            raise ModelError(
                f"model {base.name!r} is not for backbone {shape.backbone}; set model.backbone to {' or '.join(kinds)}"
            )
        self.mask_id = mask_id(base, self.kind)
        load = load_published if self.kind.published else Pretrained.load
        network: Any = load(base, self.kind.loader)
        output = network.get_output_embeddings()
        if output is None:
            raise ModelError(f"model {base.name!r}: {type(network).__name__} has no output layer; expected a masked LM")
        tokens = tokens_of_words(base, words)
        self.add_tokens(network.get_input_embeddings().weight, output.weight, tokens, shift=self.kind.shift)
        network.set_output_embeddings(self.head)
        self.network = network
        self._takes_positions = "position_ids" in inspect.signature(network.forward).parameters
        self._require_full_attention()
        self.adapt(network)

    def memory(self, query: dict[str, Tensor]) -> Memory:
        """Embed the prompts {ids i64[B, n], mask bool[B, n]}; the network runs in :meth:`logits` alone."""
        embedded = self.network.get_input_embeddings()(query["ids"])
        return Memory(query["mask"], embedded.new_zeros(len(embedded), 0), embedded=embedded)

    def unconditional(self, memory: Memory) -> Memory:
        """The memory with every prompt token replaced by [MASK], for classifier-free guidance (as LLaDA does)."""
        embedded = torch.where(memory.mask.unsqueeze(-1), self._mask_row(), required(memory.embedded))
        return Memory(memory.mask, memory.pooled, embedded=embedded)

    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        """As :meth:`.DocidModel.logits`."""
        grouped = z.dim() == 3
        codes = z if grouped else z.unsqueeze(1)
        docid = torch.where((codes >= 0).unsqueeze(-1), self.rows(codes.clamp(min=0), self.index), self._mask_row())
        prompt = required(memory.embedded).unsqueeze(1).expand(-1, codes.shape[1], -1, -1)
        mask = memory.mask.repeat_interleave(codes.shape[1], 0)
        scores = self._run(torch.cat([prompt, docid], 2).flatten(0, 1), mask)
        scores = scores.masked_fill(self.impossible, float("-inf")).unflatten(0, codes.shape[:2])
        return scores if grouped else scores.squeeze(1)

    def _run(self, x: Tensor, prompt_mask: Tensor) -> Tensor:
        """Logits [R, L, K] for embedded sequences x [R, S, d] whose prompts have the mask bool[R, n]."""
        mask = F.pad(prompt_mask, (0, self.levels), value=True)
        if self.kind.padding == "around":
            # Rotary positions are relative, so padding on the left may count among them.
            with PaddingMask(mask):
                return self.network(inputs_embeds=x).logits
        square = self.kind.padding == "square"
        inputs = {"inputs_embeds": x, "attention_mask": mask[:, None, None, :] if square else mask.long()}
        if self._takes_positions:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return self.network(**inputs).logits

    def _mask_row(self) -> Tensor:
        """The embedding [d] of [MASK]."""
        return self.network.get_input_embeddings()(torch.tensor(self.mask_id, device=self.index.device))

    @torch.no_grad()
    def _require_full_attention(self) -> None:
        """See with three short sequences that the first level sees the last one, and that nothing sees padding.

        Both faults would go unnoticed in training and cost quality only.
        """
        words = self.network.get_input_embeddings()(torch.arange(3, device=self.index.device))
        plain = torch.cat([words, self._mask_row().expand(self.levels, -1)])
        docid, padding = plain.clone(), plain.clone()
        docid[-1], padding[0] = words[1], words[2]
        mask = torch.tensor([[False, True, True]]).expand(3, -1)
        first = self._run(torch.stack([plain, docid, padding]), mask)[:, 0]
        seen, leaked = (first[1] - first[0]).abs().max(), (first[2] - first[0]).abs().max()
        if not seen > 0:
            raise ModelError(
                f"model {self.shape.base!r} has causal attention: a level does not see later ones; "
                "use a model pretrained with full attention"
            )
        if leaked > PADDING_TOLERANCE * seen:
            raise ModelError(
                f"model {self.shape.base!r} attends to padding: its code takes no mask of it; use a revision that does"
            )


def mask_id(base: Pretrained, kind: Kind) -> int:
    """The id of [MASK]: that of its kind, after a look at the configuration, or the tokenizer's.

    Raises:
        ModelError: if an id is not the one that ``kind`` names, or there is no mask token.
    """
    config = base.config()
    for name, expected in kind.ids.items():
        actual = getattr(config, name, None)
        if actual != expected:
            raise ModelError(f"model {base.name!r}: its configuration has {name}={actual}, expected {expected}")
    mask = base.tokenizer().mask_token_id if kind.mask is None else kind.mask
    if mask is None:
        raise ModelError(f"model {base.name!r}: its tokenizer has no mask token; expected a masked language model")
    return int(mask)
