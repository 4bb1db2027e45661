"""EM with every latent enumerated: what Monte-Carlo EM estimates, exactly.

With log p(z|x) and l(z) = log p(y|x,z) of all latents, log p(y|x) = log sum_z p(z|x) p(y|x,z), and for any q
log p(y|x) = ELBO(q) + KL(q || p(z|x,y)). Arrays are [..., Z], latents last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_marginal(log_prior: Tensor, log_lik: Tensor) -> Tensor:
    """log p(y|x) [...]."""
    return torch.logsumexp(log_prior + log_lik, -1)


def posterior(log_prior: Tensor, log_lik: Tensor) -> Tensor:
    """p(z|x,y) [..., Z]."""
    return torch.softmax(log_prior + log_lik, -1)


def elbo(q: Tensor, log_prior: Tensor, log_lik: Tensor) -> Tensor:
    """E_q[log p(z,y|x)] + H(q) [...]; latents of q = 0 count nothing."""
    return (q * (log_prior + log_lik)).sum(-1) + torch.special.entr(q).sum(-1)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) [...], in nats."""
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(-1)


def total_variation(q: Tensor, p: Tensor) -> Tensor:
    """Half the summed absolute difference [...], from 0 to 1."""
    return (q - p).abs().sum(-1) / 2
