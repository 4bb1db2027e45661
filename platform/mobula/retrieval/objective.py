"""Training objectives over docids: the masked-diffusion bound and next-code likelihood (spec: MDLM, LLaDA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobula.retrieval.network import MASK

EPSILON = 1e-3  # smallest masking probability; bounds the weight 1/p


def masking_rates(batch: int, generator: torch.Generator) -> Tensor:
    """Masking probability p f32[B] with antithetic times: t_b = (u + b/B) mod 1, one u a batch, p = (1-e)t + e."""
    u = torch.rand((), generator=generator)
    t = (u + torch.arange(batch) / batch) % 1.0
    return (1 - EPSILON) * t + EPSILON


def mask_codes(codes: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
    """Codes i64[B, L] with each position independently replaced by [MASK] with its row's probability."""
    hidden = torch.rand(codes.shape, generator=generator) < rates[:, None]
    return codes.masked_fill(hidden, MASK)


def diffusion_loss(logits: Tensor, codes: Tensor, z: Tensor, rates: Tensor, weight: str) -> Tensor:
    """Cross-entropy of the masked positions of z, in nats.

    ``elbo`` is the bound on -log p(c|q) per level: (1/B) sum_b (1/L) sum_{i masked} CE / p_b (MDLM, eq. 10).
    ``uniform`` is the mean over all masked positions of the batch. An empty mask contributes 0.
    """
    masked = z == MASK
    losses = F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none") * masked
    if weight == "elbo":
        return (losses / rates[:, None]).sum() / codes.numel()
    return losses.sum() / masked.sum().clamp(min=1)


def autoregressive_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean of -log p(c_l | c_<l, q) over batch and levels, in nats."""
    return F.cross_entropy(logits.transpose(1, 2).float(), codes)
