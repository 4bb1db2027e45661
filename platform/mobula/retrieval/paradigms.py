"""DiffuGR (arXiv 2511.08150; reconstruction): how a network learns docids, and how they are decoded.

A document has a code c of L positions. A network reads a query q and a code z of which some positions are hidden, and
gives log p(c_l | z, q) for every position l. Three paradigms differ in what is hidden (``corrupt``), in the training
``loss`` and in the ``decoder``:

masked diffusion (the method)
    t ~ U(0, 1), p = (1 - e) t + e; each c_l becomes [MASK] with probability p, the query never.
    Loss: sum over masked l of -log p(c_l | z, q), all alike or with the weight 1/p of the bound on -log p(c | q).
    Decoder: z = [MASK]^L; T times, predict all masked positions and commit the most confident ones.
autoregressive (the twin, on the same network with causal attention)
    Nothing is hidden: the network shifts c right by one. Loss: mean over l of -log p(c_l | c_<l, q).
    Decoder: a beam from left to right through the trie of the corpus's codes.
classifier (the control)
    Everything is hidden and positions do not see each other: L softmax heads over the query. Decoder: one pass.

The denoising loop is :mod:`.decoding.denoise`, what is made of its codes :mod:`.decoding.decoders`, the beam
:mod:`.decoding.autoregressive`, the network :mod:`.network`.

Shapes: B examples, L positions, K codes a position. A code of -1 is [MASK].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import MASK, DocidModel, NetworkKind
from mobula.retrieval.search import SearchOptions

EPSILON = 1e-3  # smallest masking probability; bounds the weight 1/p
MEAN_RATE = (1 + EPSILON) / 2  # of masking_rates


# The forward process: what is hidden of a docid


def masking_rates(batch: int, generator: torch.Generator) -> Tensor:
    """Masking probability p f32[B] with antithetic times: t_b = (u + b/B) mod 1, one u a batch, p = (1-e)t + e."""
    u = torch.rand((), generator=generator)
    t = (u + torch.arange(batch) / batch) % 1.0
    return (1 - EPSILON) * t + EPSILON


def mask_codes(codes: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
    """Codes i64[B, L] with each position independently replaced by [MASK] with its row's probability."""
    hidden = torch.rand(codes.shape, generator=generator) < rates[:, None]
    return codes.masked_fill(hidden, MASK)


# The losses, in nats


def diffusion_loss(logits: Tensor, codes: Tensor, z: Tensor, rates: Tensor, weight: str) -> Tensor:
    """Cross-entropy of the masked positions of z.

    ``elbo`` is the bound on -log p(c|q) per level: (1/B) sum_b (1/L) sum_{i masked} CE / p_b (MDLM, eq. 10).
    ``uniform`` is their sum over the number that is masked on average: a mean over examples, so that a position weighs
    the same however a batch is divided. An empty mask contributes 0.
    """
    masked = z == MASK
    losses = F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none") * masked
    if weight == "elbo":
        return (losses / rates[:, None]).sum() / codes.numel()
    return losses.sum() / (codes.numel() * MEAN_RATE)


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean over batch and levels of -log p(c_l | c_<l, q), or of -log p(c_l | q) where positions see no others."""
    return F.cross_entropy(logits.transpose(1, 2).float(), codes)


# The paradigms


class Paradigm(ABC):
    """One way of learning and decoding docids."""

    name: ClassVar[str]
    network: ClassVar[NetworkKind]  # whose attention inside the docid is full, or causal
    decoders: ClassVar[tuple[str, ...]]  # what a search may ask for, the default first
    dev: ClassVar[SearchOptions]  # how dev queries are decoded while training

    @property
    def causal(self) -> bool:
        """Whether a position sees those before it alone."""
        return self.network == "autoregressive"

    def layers(self, layers: int) -> int:
        """Transformer layers of a network that is configured to have ``layers``."""
        return layers

    @abstractmethod
    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the network sees of codes i64[B, L]: z i64[B, L] and, if positions are masked, their rates f32[B]."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: dict[str, Tensor], weight: str) -> Tensor:
        """The loss of logits f32[B, L, K] on ``codes``, ``z`` and ``rates`` of a batch."""

    @abstractmethod
    def decoder(self, model: DocidModel, table: DocidTable) -> Decoder | ArDecoder:
        """What turns a trained model and a docid table into ranked documents."""


class MaskedDiffusion(Paradigm):
    """DiffuGR: positions are masked at a random rate and denoised in parallel (LLaDA, MDLM)."""

    name = "diffusion"
    network: ClassVar[NetworkKind] = "diffusion"
    decoders: ClassVar[tuple[str, ...]] = ("match_rerank", "match", "one_pass", "best_of_n", "beam", "chain_rescore")
    dev = SearchOptions(k=10, decoder="one_pass")

    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mask each position with its example's rate; the query is never masked."""
        rates = masking_rates(len(codes), generator)
        return {"z": mask_codes(codes, rates, generator), "rates": rates}

    def loss(self, logits: Tensor, batch: dict[str, Tensor], weight: str) -> Tensor:
        """See :func:`diffusion_loss`."""
        return diffusion_loss(logits, batch["codes"], batch["z"], batch["rates"], weight)

    def decoder(self, model: DocidModel, table: DocidTable) -> Decoder | ArDecoder:
        """The denoising loop and what is made of its codes."""
        return Decoder(model, table)


class Autoregressive(Paradigm):
    """The twin on the same network: codes from left to right."""

    name = "autoregressive"
    network: ClassVar[NetworkKind] = "autoregressive"
    decoders: ClassVar[tuple[str, ...]] = ("beam", "greedy", "exhaustive")
    dev = SearchOptions(k=10, decoder="beam", beam=10)

    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing is hidden: the network itself shifts its input right by one."""
        return {"z": codes}

    def loss(self, logits: Tensor, batch: dict[str, Tensor], weight: str) -> Tensor:
        """See :func:`code_loss`."""
        return code_loss(logits, batch["codes"])

    def decoder(self, model: DocidModel, table: DocidTable) -> Decoder | ArDecoder:
        """A beam through the trie of corpus codes."""
        return ArDecoder(model, table)


class Classifier(MaskedDiffusion):
    """One softmax head a level, from the query alone: says whether denoising is needed."""

    name = "classifier"
    decoders: ClassVar[tuple[str, ...]] = ("one_pass",)

    def layers(self, layers: int) -> int:
        """None: positions do not see each other."""
        return 0

    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mask everything: t = 1."""
        return {"z": torch.full_like(codes, MASK)}

    def loss(self, logits: Tensor, batch: dict[str, Tensor], weight: str) -> Tensor:
        """See :func:`code_loss`: all positions are masked."""
        return code_loss(logits, batch["codes"])


PARADIGMS: dict[str, Paradigm] = {
    paradigm.name: paradigm for paradigm in (MaskedDiffusion(), Autoregressive(), Classifier())
}
