"""The M-step's loss: weighted log-likelihood, normalised over the queries of the global batch.

A row is a sequence of tokens with a mask: 0 is not learned (prompt, passages, templates), 1 is a token of the latent,
2 a token of the gold answer. Its weight is a constant from the E-step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobula.errors import MobulaError

LATENT, ANSWER = 1, 2


class MStepFailed(MobulaError):
    """A training that lowered the objective that it was given."""


def em_loss(
    log_probs: Tensor, mask: Tensor, weights: Tensor, queries: int, tokens: float, answer: float = 1.0
) -> Tensor:
    """-(1/queries) sum over rows of weight * (1/tokens) * sum over learned tokens of their log-probability.

    ``log_probs`` f[R, n] and ``mask`` i[R, n] belong to the predicted tokens, ``weights`` f[R] to rows. ``queries`` are
    those of the global batch, whose rows may lie in several micro-batches and on several ranks: the losses of its parts
    add up to that of the whole. ``tokens`` is one constant of a training, the mean number of learned tokens of a row:
    no row is divided by its own length. ``answer`` is the weight of answer tokens.
    """
    scale = torch.tensor([0.0, 1.0, answer], dtype=log_probs.dtype, device=log_probs.device)[mask]
    return -(weights.to(log_probs.dtype) * (scale * log_probs).sum(-1)).sum() / (queries * tokens)


def clipped_loss(
    log_probs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, queries: int, tokens: float, clip: float
) -> Tensor:
    """The loss of a policy gradient: as :func:`em_loss`, with the clipped ratio to the sampling model for each token.

    ``old`` f[R, n]: log-probabilities under the model that sampled the rows; ``advantages`` f[R] may be negative. A
    token's term is min(r A, clip(r, 1 - clip, 1 + clip) A) (Schulman et al. 2017, arXiv 1707.06347, equation 7).
    """
    ratio = (log_probs - old).exp()
    gains = advantages.to(log_probs.dtype).unsqueeze(-1)
    terms = torch.minimum(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains)
    return -(terms * (mask > 0)).sum() / (queries * tokens)


def check_q_gain(gain: float, least: float, what: str, longer: str) -> None:
    """Refuse an M-step that has changed its own objective Q by less than ``least`` nats a question.

    ``what`` names the M-step in the error, ``longer`` the key that trains for longer.

    Raises:
        MStepFailed: if it has.
    """
    if gain < least:
        raise MStepFailed(
            f"{what}: the training changed its own objective by {gain:.3f} nats, below em.min_q_gain={least}; "
            f"lower fit.lr, or train for longer ({longer})"
        )


def learned_tokens(masks: Sequence[Sequence[int]]) -> float:
    """The mean number of learned tokens of a row: the constant of a training."""
    return sum(sum(1 for token in mask if token) for mask in masks) / len(masks)
