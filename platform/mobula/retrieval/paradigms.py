"""DiffuGR (arXiv 2511.08150; reconstruction): how a network learns docids, and how they are decoded.

A document has a code c of L positions. A network reads a query q and a code z of which some positions are hidden, and
gives log p(c_l | z, q) for every position l. Three paradigms differ in what is hidden (``corrupt``), in the training
``loss`` and in the ``decoder``:

masked diffusion (the method)
    t ~ U(0, 1), p = (1 - e) t + e; each c_l becomes [MASK] with probability p, the query never. With
    ``masking: confidence`` (ours, after DiffGRM, arXiv 2510.21805) the ceil(p L) levels that the network is least sure
    of with everything masked do: the states that decoding passes through.
    Loss: sum over masked l of -log p(c_l | z, q), all alike or with the weight 1/p of the bound on -log p(c | q).
    Decoder: z = [MASK]^L; T times, predict all masked positions and commit the most confident ones.
autoregressive (the twin, on the same network with causal attention)
    Nothing is hidden: the network shifts c right by one. Loss: mean over l of -log p(c_l | c_<l, q).
    Decoder: a beam from left to right through the trie of the corpus's codes.
classifier (the control)
    Everything is hidden and positions do not see each other: L softmax heads over the query. Decoder: one pass.

All three may learn to rank as well (ours; a listwise loss, as LTRGR, RIPOR and DDRO have at other levels): with the
score s(d) that the paradigm ranks by, sum over l of log p(c_l | everything masked, q), or log p(c | q) of the twin,

    -log softmax over docids d of s(d), at the right one

Masked diffusion may do so in the partly masked state z as well, among the docids that agree with what z shows: there
the same sum tells apart what the constraint leaves to decoding.

The denoising loop is :mod:`.decoding.denoise`, what is made of its codes :mod:`.decoding.decoders`, the beam
:mod:`.decoding.autoregressive`, the network :mod:`.network`.

Shapes: B examples, L positions, K codes a position, C docids of the corpus. A code of -1 is [MASK].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mobula.config import key
from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import MASK, DocidModel, NetworkKind
from mobula.retrieval.search import SearchOptions

EPSILON = 1e-3  # smallest masking probability; bounds the weight 1/p
MEAN_RATE = (1 + EPSILON) / 2  # of masking_rates


Batch = dict[str, Tensor]
Ask = Callable[[Tensor], Tensor]  # the batch's queries: logits f32[B, (G,) L, K] of codes z i64[B, (G,) L]


@dataclass
class LossConfig:
    """What docid models learn."""

    weight: str = key("uniform", "weight of a masked position of masked diffusion", choices=("uniform", "elbo"))
    masking: str = key(
        "random", "masked diffusion hides levels at random, or those that it is least sure of",
        choices=("random", "confidence"),
    )  # fmt: skip
    ranking: float = key(0.0, "weight of the loss that ranks docids, of every paradigm; 0: none", ge=0)
    agreeing: float = key(
        0.0, "masked diffusion: weight of ranking, in a partly masked state, the docids that agree with it", ge=0
    )
    candidates: int = key(10_000, "docids that are ranked at once; of a larger corpus some are drawn", ge=2)
    negatives: int = key(15, "docids that the twin, which must read each of them, ranks beside the right one", ge=1)


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


def mask_unsure(codes: Tensor, rates: Tensor, log_probs: Tensor) -> Tensor:
    """Codes i64[B, L] with the ceil(p L) levels masked whose likeliest code is least likely, in f32[B, L, K]."""
    hidden = (rates * codes.shape[1]).ceil()
    confidence = log_probs.amax(-1)
    # Ties: the later position is hidden first, as decoding commits the lowest first.
    rank = confidence.flip(1).argsort(dim=1, stable=True).argsort(1).flip(1)
    return codes.masked_fill(rank < hidden[:, None], MASK)


# The losses, in nats


def diffusion_loss(
    logits: Tensor, codes: Tensor, z: Tensor, rates: Tensor, weight: str, mean_rate: float = MEAN_RATE
) -> Tensor:
    """Cross-entropy of the masked positions of z.

    ``elbo`` is the bound on -log p(c|q) per level: (1/B) sum_b (1/L) sum_{i masked} CE / p_b (MDLM, eq. 10).
    ``uniform`` is their sum over the number that is masked on average, the share ``mean_rate``: a mean over examples,
    so that a position weighs the same however a batch is divided. An empty mask contributes 0.
    """
    masked = z == MASK
    losses = F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none") * masked
    if weight == "elbo":
        return (losses / rates[:, None]).sum() / codes.numel()
    return losses.sum() / (codes.numel() * mean_rate)


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean over batch and levels of -log p(c_l | c_<l, q), or of -log p(c_l | q) where positions see no others."""
    return F.cross_entropy(logits.transpose(1, 2).float(), codes)


def docid_scores(log_probs: Tensor, docids: Tensor) -> Tensor:
    """Sum over levels of log p, f32[B, C], of docids i64[C, L] from one table f32[B, L, K]."""
    levels = range(docids.shape[1])
    return torch.stack([log_probs[:, level].index_select(1, docids[:, level]) for level in levels]).sum(0)


def ranking_loss(scores: Tensor, target: Tensor, others: Tensor) -> Tensor:
    """Mean of -log softmax f32[B, C] at ``target`` i64[B], without the docids ``others`` bool[B, C]."""
    return F.cross_entropy(scores.masked_fill(others, float("-inf")), target)


def agree(docids: Tensor, z: Tensor) -> Tensor:
    """Which docids i64[C, L] have every code that z i64[B, L] shows, bool[B, C]."""
    pairs = zip(z.T[..., None], docids.T, strict=True)
    return torch.stack([(shown == codes) | (shown == MASK) for shown, codes in pairs]).all(0)


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

    def ranks(self, config: LossConfig) -> bool:
        """Whether its loss ranks docids."""
        return config.ranking > 0

    @abstractmethod
    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the network sees of codes i64[B, L]: z i64[B, L] and, if positions are masked, their rates f32[B]."""

    @abstractmethod
    def loss(self, ask: Ask, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
        """Losses by name, each a mean over examples, of a batch's ``codes``, ``z`` and ``rates``.

        Where docids are ranked it has ``docids``, those to rank, the place of the right one ``target`` i64[B], and
        ``others`` bool[B, C], which are right as well.
        """

    @abstractmethod
    def decoder(self, model: DocidModel, table: DocidTable) -> Decoder | ArDecoder:
        """What turns a trained model and a docid table into ranked documents."""


class MaskedDiffusion(Paradigm):
    """DiffuGR: positions are masked at a random rate and denoised in parallel (LLaDA, MDLM)."""

    name = "diffusion"
    network: ClassVar[NetworkKind] = "diffusion"
    decoders: ClassVar[tuple[str, ...]] = ("match_rerank", "match", "one_pass", "best_of_n", "beam", "chain_rescore")
    dev = SearchOptions(k=10, decoder="one_pass")

    def ranks(self, config: LossConfig) -> bool:
        """Also in partly masked states."""
        return config.ranking > 0 or config.agreeing > 0

    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mask each position with its example's rate; the query is never masked."""
        rates = masking_rates(len(codes), generator)
        return {"z": mask_codes(codes, rates, generator), "rates": rates}

    def loss(self, ask: Ask, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
        """See :func:`diffusion_loss` and :func:`ranking_loss`."""
        codes, z, rates, share = batch["codes"], batch["z"], batch["rates"], MEAN_RATE
        hidden = torch.full_like(codes, MASK)
        if config.masking == "confidence":
            first = ask(hidden)
            z = mask_unsure(codes, rates, torch.log_softmax(first.detach().float(), -1))
            rates, share = (z == MASK).float().mean(1), (codes.shape[1] + 1) / (2 * codes.shape[1])
            logits = ask(z)
        elif config.ranking:
            first, logits = ask(torch.stack([hidden, z], 1)).unbind(1)
        else:
            logits = ask(z)
        losses = {"masked": diffusion_loss(logits, codes, z, rates, config.weight, share)}
        if config.agreeing:
            # All docids that are left have the codes that z shows, so what the network says there cancels.
            others = batch["others"] | ~agree(batch["docids"], z)
            losses["agreeing"] = config.agreeing * _ranked(logits, batch, others)
        if config.ranking:
            losses["ranking"] = config.ranking * _ranked(first, batch, batch["others"])
        return losses

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

    def loss(self, ask: Ask, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
        """See :func:`code_loss`; and :func:`ranking_loss` over the docids i64[B, C, L] that each example has."""
        if not config.ranking:
            return {"next": code_loss(ask(batch["z"]), batch["codes"])}
        logits, docids = ask(batch["docids"]), batch["docids"]
        taken = torch.log_softmax(logits.float(), -1).gather(-1, docids.unsqueeze(-1)).squeeze(-1)
        own = torch.arange(len(docids), device=docids.device)
        ranked = ranking_loss(taken.sum(-1), batch["target"], batch["others"])
        return {"next": -taken[own, batch["target"]].mean(), "ranking": config.ranking * ranked}

    def decoder(self, model: DocidModel, table: DocidTable) -> Decoder | ArDecoder:
        """A beam through the trie of corpus codes."""
        return ArDecoder(model, table)


class Classifier(MaskedDiffusion):
    """One softmax head a level, from the query alone: says whether denoising is needed."""

    name = "classifier"
    decoders: ClassVar[tuple[str, ...]] = ("one_pass",)

    def ranks(self, config: LossConfig) -> bool:
        """With everything masked alone."""
        return config.ranking > 0

    def layers(self, layers: int) -> int:
        """None: positions do not see each other."""
        return 0

    def corrupt(self, codes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mask everything: t = 1."""
        return {"z": torch.full_like(codes, MASK)}

    def loss(self, ask: Ask, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
        """See :func:`code_loss`: all positions are masked. And :func:`ranking_loss`."""
        logits = ask(batch["z"])
        losses = {"masked": code_loss(logits, batch["codes"])}
        if config.ranking:
            losses["ranking"] = config.ranking * _ranked(logits, batch, batch["others"])
        return losses


def _ranked(logits: Tensor, batch: Batch, others: Tensor) -> Tensor:
    """The ranking loss of a table f32[B, L, K]."""
    scores = docid_scores(torch.log_softmax(logits.float(), -1), batch["docids"])
    return ranking_loss(scores, batch["target"], others)


PARADIGMS: dict[str, Paradigm] = {
    paradigm.name: paradigm for paradigm in (MaskedDiffusion(), Autoregressive(), Classifier())
}
