"""How much what is estimated from m samples varies from draw to draw: the likelihood, and the selector's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mobula.rag.weights import Sampled, WeightConfig, weigh

LIKELIHOOD, GRADIENT = "likelihood", "gradient"
# By what varies, then samples m: f64[Q], one a question.
Variances = dict[str, dict[int, np.ndarray]]


def variances(
    priors: np.ndarray,
    scores: Sequence[Mapping[str, np.ndarray]],
    products: Sequence[np.ndarray],
    config: WeightConfig,
    samples: Sequence[int],
    redraws: int,
) -> Variances:
    """The variance, over ``redraws``, of two estimates from m latents of every question, whose latents are enumerated.

    ``likelihood``: of (1/m) sum_k p(y|x,z_k). ``gradient``: of sum_k w_k grad log p(z_k|x), the M-step's gradient, as
    the trace of its covariance. ``priors`` f64[Q, Z]: p(z|x). ``scores``, by question: ``log_lik``, ``reward`` and
    ``em`` f64[Z], and the number of ``answer_tokens``. ``products``: as :func:`gradient_products`.
    """
    rng = np.random.default_rng(0)
    values: dict[str, dict[int, list[float]]] = {what: {m: [] for m in samples} for what in (LIKELIHOOD, GRADIENT)}
    for prior, one, product in zip(priors, scores, products, strict=True):
        for m in samples:
            draws = rng.choice(len(prior), size=(redraws, m), p=prior / prior.sum())
            estimates = np.exp(one["log_lik"])[draws].mean(1)
            values[LIKELIHOOD][m].append(float(estimates.var(ddof=1)))
            values[GRADIENT][m].append(trace(_weights(one, draws, config), product))
    return {what: {m: np.array(column) for m, column in by_m.items()} for what, by_m in values.items()}


def _weights(scores: Mapping[str, np.ndarray], draws: np.ndarray, config: WeightConfig) -> np.ndarray:
    """The weight f64[R, Z] that every latent has in each of R draws i64[R, m]."""
    weights = np.zeros((len(draws), len(scores["log_lik"])))
    for row, z in zip(weights, draws, strict=True):
        columns = (scores[name][z] for name in ("reward", "em"))
        sampled = Sampled(scores["log_lik"][z], int(scores["answer_tokens"]), np.zeros(len(z)), *columns)
        np.add.at(row, z, weigh(sampled, config).values)
    return weights


def trace(weights: np.ndarray, products: np.ndarray) -> float:
    """The trace of the covariance of sum_z w_z g_z over draws of w f64[R, Z], from products g_z . g_y f64[Z, Z]."""
    centred = weights - weights.mean(0)
    return float(np.einsum("rz,zy,ry->", centred, products, centred) / (len(weights) - 1))


def gradient_products(module: nn.Module, log_p: Tensor) -> np.ndarray:
    """f64[Z, Z]: products of the gradients of log p(z|x) f[Z] by the parameters of a network."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = []
    for one in log_p:
        parts = torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(rows).double()
    return (gradients @ gradients.T).numpy()
