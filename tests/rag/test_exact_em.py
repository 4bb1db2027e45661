"""EM with every latent enumerated: 16 queries, 6 candidates, ordered pairs of them, in double precision.

What the method's theory says of exact EM is checked here, and that sampling, weights and the loss estimate it.
"""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mobula.rag.exact import divergence, elbo, log_marginal, posterior, total_variation
from mobula.rag.objective import ANSWER, LATENT, em_loss, learned_tokens
from mobula.rag.weights import Sampled, WeightConfig, weigh

QUERIES, CANDIDATES, FEATURES, ANSWERS = 16, 6, 8, 12
PAIRS = torch.tensor(list(itertools.permutations(range(CANDIDATES), 2)))
MASK = torch.tensor([LATENT, LATENT, ANSWER])


class Toy(nn.Module):
    """A selector that picks two candidates one after the other, and a generator that reads them in this order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(FEATURES, 1)
        self.second = nn.Linear(2 * FEATURES, 1)
        self.generator = nn.Sequential(nn.Linear(2 * FEATURES, 32), nn.Tanh(), nn.Linear(32, ANSWERS))
        self.double()

    def steps(self, features: Tensor) -> Tensor:
        """log p of both choices of every pair [Q, 30, 2]."""
        one = features[:, PAIRS[:, 0]]
        first = torch.log_softmax(self.first(features).squeeze(-1), -1)[:, PAIRS[:, 0]]
        every = features.unsqueeze(1).expand(-1, len(PAIRS), -1, -1)
        both = torch.cat([one.unsqueeze(2).expand_as(every), every], -1)
        scores = self.second(both).squeeze(-1)
        taken = nn.functional.one_hot(PAIRS[:, 0], CANDIDATES).bool()
        second = torch.log_softmax(scores.masked_fill(taken, -math.inf), -1)
        chosen = second.gather(-1, PAIRS[:, 1].expand(len(features), -1).unsqueeze(-1)).squeeze(-1)
        return torch.stack([first, chosen], -1)

    def forward(self, features: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z|x) and log p(y|x,z), both [Q, 30]."""
        context = torch.cat([features[:, PAIRS[:, 0]], features[:, PAIRS[:, 1]]], -1)
        said = torch.log_softmax(self.generator(context), -1)
        wanted = answers.view(-1, 1, 1).expand(-1, len(PAIRS), 1)
        return self.steps(features).sum(-1), said.gather(-1, wanted).squeeze(-1)

    def gradient(self) -> Tensor:
        """The gradients of all parameters in one row; those that have none are zero."""
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters()])


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(QUERIES, CANDIDATES, FEATURES, generator=generator, dtype=torch.float64)
    return features, torch.randint(ANSWERS, (QUERIES,), generator=generator)


def draw(log_prior: Tensor, log_lik: Tensor, m: int, seed: int, rule: str = "snis") -> Tensor:
    """Weights [Q, 30] of m pairs sampled for each query, summed where a pair was drawn more than once."""
    chance = np.random.default_rng(seed)
    found = torch.zeros_like(log_prior)
    for query in range(len(log_prior)):
        prior = log_prior[query].exp().numpy()
        chosen = chance.choice(len(prior), size=m, p=prior / prior.sum())
        nothing = np.zeros(m)
        sampled = Sampled(log_lik[query, chosen].numpy(), 1, nothing, nothing, nothing)
        found[query].index_add_(
            0, torch.from_numpy(chosen), torch.from_numpy(weigh(sampled, WeightConfig(rule)).values)
        )
    return found


def test_the_prior_sums_to_one_and_the_bound_is_tight_at_the_posterior(data: tuple[Tensor, Tensor]) -> None:
    log_prior, log_lik = Toy()(*data)
    assert (log_prior.exp().sum(-1) - 1).abs().max() <= 1e-10
    truth, best = log_marginal(log_prior, log_lik), posterior(log_prior, log_lik)
    for seed in range(5):
        noise = torch.randn(log_prior.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q = torch.softmax(3 * noise, -1)
        assert (elbo(q, log_prior, log_lik) + divergence(q, best) - truth).abs().max() <= 1e-9
        assert (elbo(q, log_prior, log_lik) < truth).all()
    assert (elbo(best, log_prior, log_lik) - truth).abs().max() <= 1e-9


@pytest.mark.parametrize("logarithm", [True, False])
def test_the_m_step_gradient_is_that_of_the_likelihood(data: tuple[Tensor, Tensor], logarithm: bool) -> None:
    """Against finite differences: the papers' reading as a policy gradient, its reward the posterior or p(y|x,z)."""
    model = Toy()
    log_prior, log_lik = model(*data)
    weights = posterior(log_prior, log_lik) if logarithm else (log_prior + log_lik).exp()
    (weights.detach() * (log_prior + log_lik)).sum().backward()
    found = model.gradient()

    def value() -> float:
        with torch.no_grad():
            marginal = log_marginal(*model(*data))
        return float((marginal if logarithm else marginal.exp()).sum())

    step, numeric = 1e-6, []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            flat[i] = kept + step
            above = value()
            flat[i] = kept - step
            numeric.append((above - value()) / (2 * step))
            flat[i] = kept
    expected = torch.tensor(numeric, dtype=torch.float64)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_weights_converge_to_the_posterior(data: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        log_prior, log_lik = Toy()(*data)
    log_lik = 2 * log_lik  # so that the posterior is far from the prior
    truth = posterior(log_prior, log_lik)
    counts = [30, 300, 3000, 30_000]
    away = [float(total_variation(draw(log_prior, log_lik, m, seed=m), truth).mean()) for m in counts]
    assert away[1] <= 0.12
    assert away[3] <= 0.02
    slope = np.polyfit(np.log(counts), np.log(away), 1)[0]
    assert -0.65 <= slope <= -0.35
    # Uniform weights converge to the prior instead.
    uniform = draw(log_prior, log_lik, 30_000, seed=0, rule="uniform")
    assert float(total_variation(uniform, truth).mean()) > 0.1
    assert float(total_variation(uniform, log_prior.exp()).mean()) <= 0.02


def fit(model: Toy, data: tuple[Tensor, Tensor], weights: Tensor, steps: int = 20, lr: float = 0.05) -> None:
    """An M-step: plain gradient descent on the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        log_prior, log_lik = model(*data)
        (-(weights * (log_prior + log_lik)).sum() / QUERIES).backward()
        optimizer.step()


def likelihood(model: Toy, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(log_marginal(*model(*data)).mean())


def test_exact_em_never_lowers_the_likelihood(data: tuple[Tensor, Tensor]) -> None:
    model = Toy()
    found = [likelihood(model, data)]
    for _ in range(10):
        with torch.no_grad():
            weights = posterior(*model(*data))
        fit(model, data, weights)
        found.append(likelihood(model, data))
    assert all(after > before for before, after in itertools.pairwise(found)), found


@pytest.mark.parametrize("seed", range(3))
def test_sampled_em_climbs(data: tuple[Tensor, Tensor], seed: int) -> None:
    model = Toy(seed)
    found = [likelihood(model, data)]
    for iteration in range(60):
        with torch.no_grad():
            log_prior, log_lik = model(*data)
        fit(model, data, draw(log_prior, log_lik, 8, seed=1000 * seed + iteration))
        found.append(likelihood(model, data))
    assert min(after - before for before, after in itertools.pairwise(found)) >= -0.05
    assert found[-1] >= found[0] + 1.5


def rows(data: tuple[Tensor, Tensor]) -> list[tuple[int, int, float]]:
    """(query, pair, weight), with more rows for some queries than for others."""
    chance = np.random.default_rng(0)
    return [
        (query, int(pair), float(weight))
        for query in range(QUERIES)
        for pair, weight in zip(chance.permutation(30)[: 1 + query % 5], chance.random(5), strict=False)
    ]


def part_loss(model: Toy, data: tuple[Tensor, Tensor], part: Sequence[tuple[int, int, float]]) -> Tensor:
    """The share of some rows in the loss of the whole batch."""
    features, answers = data
    query, pair, weight = (torch.tensor(column) for column in zip(*part, strict=True))
    _, log_lik = model(features, answers)
    steps = model.steps(features)
    log_probs = torch.cat([steps[query, pair], log_lik[query, pair].unsqueeze(-1)], -1)
    tokens = learned_tokens([MASK.tolist()] * len(part))
    return em_loss(log_probs, MASK.expand(len(part), -1), weight, QUERIES, tokens)


def gradient_of(data: tuple[Tensor, Tensor], parts: Sequence[Sequence[tuple[int, int, float]]]) -> Tensor:
    model = Toy()
    for part in parts:
        part_loss(model, data, part).backward()
    return model.gradient()


def test_a_gradient_does_not_depend_on_how_rows_are_divided(data: tuple[Tensor, Tensor]) -> None:
    every = rows(data)
    whole = gradient_of(data, [every])
    for parts in ([every[i::8] for i in range(8)], [every[:3], every[3:]], [[row] for row in every]):
        assert (gradient_of(data, parts) - whole).norm() <= 1e-9 * whole.norm()
    # A mean over each part's own rows would not be the same.
    wrong = Toy()
    for part in (every[:3], every[3:]):
        (part_loss(wrong, data, part) / len(part)).backward()
    scaled = wrong.gradient() * (whole.norm() / wrong.gradient().norm())
    assert (scaled - whole).norm() > 1e-3 * whole.norm()


def _rank(rank: int, port: int, data: tuple[Tensor, Tensor], queue: mp.SimpleQueue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = rows(data)[rank::2]
    # The average over ranks that training engines take is undone by the number of ranks.
    gradient = 2 * gradient_of(data, [mine[i::4] for i in range(4)])
    dist.all_reduce(gradient)
    if rank == 0:
        queue.put((gradient / 2).tolist())
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one(data: tuple[Tensor, Tensor]) -> None:
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = mp.spawn(_rank, args=(port, data, queue), nprocs=2, join=False)
    found = torch.tensor(queue.get(), dtype=torch.float64)
    while not workers.join():
        pass
    whole = gradient_of(data, [rows(data)])
    assert (found - whole).norm() <= 1e-9 * whole.norm()
