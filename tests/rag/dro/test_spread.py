"""The M-step's gap, the spread of the selector's orders, and how estimates vary with the number of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from mobula.alternation import Row
from mobula.artifacts import write_jsonl
from mobula.config import build
from mobula.rag.dro.config import Config
from mobula.rag.dro.facts.networks import Shape
from mobula.rag.dro.facts.source import Facts, FactsNetworks
from mobula.rag.dro.facts.training import Split, WeightedTask, open_network
from mobula.rag.dro.gap import entropy, objective
from mobula.rag.dro.pair import KINDS, Pair
from mobula.rag.dro.variance import GRADIENT, LIKELIHOOD, gradient_products, trace, variances
from mobula.rag.weights import WeightConfig

SHAPE = Shape(1, 16, 4)


@pytest.fixture(scope="module")
def source() -> Facts:
    values = {
        "method": "dro",
        "data": {"labelled": 10, "train": 40, "dev": 40, "test": 10},
        "model": {"layers": 1, "selector_width": 16, "generator_width": 16},
    }
    return Facts(build(Config, values))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    for kind in KINDS:
        save_model(open_network(kind, SHAPE, None, 3), str(folder / f"{kind}.safetensors"))
    return Pair(*(folder / f"{kind}.safetensors" for kind in KINDS))


def networks(source: Facts, pair: Pair) -> FactsNetworks:
    return source.open(pair)


def weighted(source: Facts) -> list[Row]:
    return [{"query": q, "orders": [3, 7, q % 30], "weights": [0.5, 0.2, 0.3]} for q in range(10)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_weighted_log_likelihood_of_a_question(
    source: Facts, pair: Pair, tmp_path: Path, kind: str
) -> None:
    rows, file = weighted(source), tmp_path / "rows.jsonl"
    write_jsonl(file, rows)
    exact = networks(source, pair).exact("train", list(range(10)))[KINDS.index(kind)]
    wanted = [
        sum(w * float(exact[r["query"], z]) for z, w in zip(r["orders"], r["weights"], strict=True)) for r in rows
    ]
    task = source.task(kind, "train", file, getattr(pair, kind), 0)
    assert objective(task, task.build(), 4) == pytest.approx(np.mean(wanted), rel=1e-5)
    assert objective(task, task.build(), 10) == pytest.approx(objective(task, task.build(), 3), rel=1e-5)


def test_entropy_is_that_of_the_selector_that_drew(source: Facts, pair: Pair, tmp_path: Path) -> None:
    queries = list(range(20))
    prior = networks(source, pair).exact("train", queries)[0]
    drawn = networks(source, pair).sample("train", queries, 400, queries)
    rows = [{"query": query, **row} for query, row in zip(queries, drawn, strict=True)]
    wanted = float(torch.special.entr(prior.exp()).sum(-1).mean())
    assert entropy(source, rows, pair.selector, tmp_path / "rows.jsonl", 8) == pytest.approx(wanted, abs=0.03)


def test_products_are_those_of_the_gradients_of_log_p(source: Facts, pair: Pair, tmp_path: Path) -> None:
    """A weight's gradient is linear: the squared norm of the M-step's gradient is w K w."""
    file, weights = tmp_path / "rows.jsonl", np.array([0.7, 0.0, 0.3])
    write_jsonl(file, [{"query": 5, "orders": [3, 7, 11], "weights": weights.tolist()}])
    task = WeightedTask("selector", SHAPE, Split(40, source.split("train").seed), file, pair.selector, 0)
    (products,) = gradient_products(task)
    model = task.build().eval()
    loss, _ = task.loss(model, task.batch(torch.tensor([0]), torch.Generator()))
    loss.backward()
    norm = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None) * task.tokens**2
    assert weights @ products @ weights == pytest.approx(norm, rel=1e-4)


def test_the_trace_is_that_of_the_covariance_of_gradients() -> None:
    chance = np.random.default_rng(0)
    gradients, weights = chance.normal(size=(6, 9)), chance.random((50, 6))
    wanted = np.trace(np.cov((weights @ gradients).T))
    assert trace(weights, gradients @ gradients.T) == pytest.approx(wanted)


def test_estimates_vary_less_with_more_samples(source: Facts, pair: Pair, tmp_path: Path) -> None:
    found = variances(source, pair, WeightConfig(), (1, 4, 16), 64, tmp_path / "rows.jsonl")
    means = {what: [float(by_m[m].mean()) for m in (1, 4, 16)] for what, by_m in found.items()}
    for one, four, sixteen in (means[LIKELIHOOD], means[GRADIENT]):
        assert one / four == pytest.approx(4, rel=0.4)
        assert four / sixteen == pytest.approx(4, rel=0.4)
