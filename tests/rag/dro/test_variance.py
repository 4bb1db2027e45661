"""The M-step's gain, the spread of the selector's permutations, and how estimates vary with the number of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from mobula.alternation import Row
from mobula.config import build
from mobula.rag.dro.config import KINDS, Config
from mobula.rag.dro.data import FactWorld
from mobula.rag.dro.dro import entropy, objective
from mobula.rag.dro.networks import Networks, network_of
from mobula.rag.dro.study import redrawn
from mobula.rag.em import Checkpoint
from mobula.rag.variance import GRADIENT, LIKELIHOOD, gradient_products, trace
from mobula.rag.weights import WeightConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FactWorld:
    values = {
        "method": "dro",
        "data": {"labelled": 10, "train": 40, "dev": 40, "test": 10},
        "model": {"layers": 1, "selector_width": 16, "generator_width": 16},
    }
    return FactWorld(build(Config, values), tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def checkpoint(world: FactWorld, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    for kind in KINDS:
        save_model(network_of(kind, world).build(3), str(folder / f"{kind}.safetensors"))
    return {kind: folder / f"{kind}.safetensors" for kind in KINDS}


@pytest.fixture
def networks(world: FactWorld, checkpoint: Checkpoint) -> Networks:
    return Networks.of(world, **checkpoint)


def weighted(world: FactWorld) -> list[Row]:
    every = world.permutations()
    return [
        {"query": q, "permutations": [every[3], every[7], every[q % 30]], "weights": [0.5, 0.2, 0.3]} for q in range(10)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_weighted_log_likelihood_of_a_question(
    world: FactWorld, checkpoint: Checkpoint, networks: Networks, kind: str
) -> None:
    rows, every = weighted(world), world.permutations()
    exact = networks.exact(world.take("train", list(range(10))))[KINDS.index(kind)]
    wanted = [
        sum(w * float(exact[r["query"], every.index(z)]) for z, w in zip(r["permutations"], r["weights"], strict=True))
        for r in rows
    ]
    network = network_of(kind, world, checkpoint[kind])
    assert objective(network, rows, 4) == pytest.approx(np.mean(wanted), rel=1e-5)
    assert objective(network, rows, 10) == pytest.approx(objective(network, rows, 3), rel=1e-5)


def test_entropy_is_that_of_the_selector_that_sampled(world: FactWorld, networks: Networks) -> None:
    queries = list(range(20))
    questions = world.take("train", queries)
    prior = networks.exact(questions)[0]
    samples = networks.selector.sample(questions, 400, queries)
    rows = [{"query": query, **row} for query, row in zip(queries, samples, strict=True)]
    wanted = float(torch.special.entr(prior.exp()).sum(-1).mean())
    assert entropy(networks.selector, rows, 8) == pytest.approx(wanted, abs=0.03)


def test_products_are_those_of_the_gradients_of_log_p(world: FactWorld, networks: Networks) -> None:
    """A weight's gradient is linear: the squared norm of the M-step's gradient is w K w."""
    weights, every, selector = np.array([0.7, 0.0, 0.3]), world.permutations(), networks.selector
    row = {"query": 5, "permutations": [every[3], every[7], every[11]], "weights": weights.tolist()}
    batch, model = selector.batch(world.take("train", [5]), [row]), selector.build(0).eval()
    products = gradient_products(model, selector.log_probs(model, batch).sum(-1))
    (batch["weights"] * selector.log_probs(model, batch).sum(-1)).sum().backward()
    norm = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
    assert weights @ products @ weights == pytest.approx(norm, rel=1e-4)


def test_the_trace_is_that_of_the_covariance_of_gradients() -> None:
    rng = np.random.default_rng(0)
    gradients, weights = rng.normal(size=(6, 9)), rng.random((50, 6))
    wanted = np.trace(np.cov((weights @ gradients).T))
    assert trace(weights, gradients @ gradients.T) == pytest.approx(wanted)


def test_estimates_vary_less_with_more_samples(networks: Networks) -> None:
    varied = redrawn(networks, WeightConfig(), 64)
    means = {what: [float(by_m[m].mean()) for m in (1, 4, 14)] for what, by_m in varied.items()}
    for one, four, fourteen in (means[LIKELIHOOD], means[GRADIENT]):
        assert one / four == pytest.approx(4, rel=0.4)
        assert four / fourteen == pytest.approx(3.5, rel=0.4)
