"""How much what is estimated from m samples varies from draw to draw: the likelihood, and the selector's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mobula.artifacts import write_jsonl
from mobula.rag.dro.pair import Pair
from mobula.rag.dro.source import Judged, OrdersTask, Source
from mobula.rag.weights import Sampled, WeightConfig, weigh

LIKELIHOOD, GRADIENT = "likelihood", "gradient"
QUESTIONS = 40
# By what varies, then samples m: f64[Q], one a question.
Variances = dict[str, dict[int, np.ndarray]]


def variances(
    source: Source, pair: Pair, weights: WeightConfig, samples: Sequence[int], redraws: int, file: Path
) -> Variances:
    """The variance, over ``redraws``, of two estimates from m orders of a dev question, whose orders can be listed.

    ``likelihood``: of (1/m) sum_k p(y|x,d_zk). ``gradient``: of sum_k w_k grad log p(z_k|x), the selector's part of the
    M-step, as the trace of its covariance. ``file`` is written on the way.
    """
    queries, orders = source.queries("dev")[:QUESTIONS], source.orders()
    networks, chance = source.open(pair), np.random.default_rng(0)
    log_prior, _ = networks.exact("dev", queries)
    judged = networks.judge("dev", queries, [orders] * len(queries))
    write_jsonl(file, [{"query": query, "orders": orders, "weights": [1.0] * len(orders)} for query in queries])
    products = gradient_products(source.task("selector", "dev", file, pair.selector, 0))
    found: dict[str, dict[int, list[float]]] = {what: {m: [] for m in samples} for what in (LIKELIHOOD, GRADIENT)}
    for prior, one, product in zip(log_prior.exp().numpy(), judged, products, strict=True):
        for m in samples:
            drawn = chance.choice(len(prior), size=(redraws, m), p=prior / prior.sum())
            estimates = np.exp(np.array(one.log_lik))[drawn].mean(1)
            found[LIKELIHOOD][m].append(float(estimates.var(ddof=1)))
            found[GRADIENT][m].append(trace(_weights(one, drawn, weights), product))
    return {what: {m: np.array(values) for m, values in by_m.items()} for what, by_m in found.items()}


def _weights(judged: Judged, drawn: np.ndarray, config: WeightConfig) -> np.ndarray:
    """The weight f64[R, Z] that every order has in each of R draws i64[R, m]."""
    columns = [np.array(column) for column in (judged.log_lik, judged.reward, judged.right)]
    found = np.zeros((len(drawn), len(judged.log_lik)))
    for row, places in zip(found, drawn, strict=True):
        log_lik, reward, right = (column[places] for column in columns)
        values = weigh(Sampled(log_lik, judged.tokens, np.zeros(len(places)), reward, right), config).values
        np.add.at(row, places, values)
    return found


def trace(weights: np.ndarray, products: np.ndarray) -> float:
    """The trace of the covariance of sum_z w_z g_z over draws of w f64[R, Z], from products g_z . g_y f64[Z, Z]."""
    apart = weights - weights.mean(0)
    return float(np.einsum("rz,zy,ry->", apart, products, apart) / (len(weights) - 1))


def gradient_products(task: OrdersTask) -> list[np.ndarray]:
    """For each question of a selector's task, f64[Z, Z]: products of the gradients of log p(z|x) of its orders."""
    model = task.build().eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for query in range(task.examples):
        batch = task.batch(torch.tensor([query]), torch.Generator())
        weights = batch["weights"].requires_grad_()
        loss, _ = task.loss(model, {**batch, "weights": weights})
        # The loss is linear in its weights: its derivative by one of them is -log p(z|x) over the tokens of a row.
        (slopes,) = torch.autograd.grad(loss, weights, create_graph=True)
        rows = []
        for log_p in (-task.tokens * slopes).flatten():
            parts = torch.autograd.grad(log_p, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        gradients = torch.stack(rows).double()
        found.append((gradients @ gradients.T).numpy())
    return found
