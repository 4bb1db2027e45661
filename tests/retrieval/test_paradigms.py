"""Masking and losses (spec 3.3, trap 4)."""

from __future__ import annotations

import math

import pytest
import torch

from mobula.retrieval.paradigms import (
    EPSILON,
    MEAN_RATE,
    PARADIGMS,
    LossConfig,
    agree,
    code_loss,
    diffusion_loss,
    docid_scores,
    mask_codes,
    mask_unsure,
    masking_rates,
    ranking_loss,
)

B, L, K = 6, 4, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, L, K, generator=generator()), torch.randint(K, (B, L), generator=generator(1))


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_loss_only_masked(weight: str) -> None:
    logits, codes = example()
    rates = masking_rates(B, generator())
    z = codes.clone()
    z[:, 1] = -1
    logits.requires_grad_()
    diffusion_loss(logits, codes, z, rates, weight).backward()
    touched = logits.grad.abs().sum((0, 2)) > 0
    assert touched.tolist() == [False, True, False, False]


def test_uniform_weighs_masked_positions_alike() -> None:
    logits, codes = example()
    z = mask_codes(codes, torch.full((B,), 0.5), generator())
    losses = -torch.log_softmax(logits, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    expected = losses[z == -1].sum() / (B * L * MEAN_RATE)
    assert diffusion_loss(logits, codes, z, torch.full((B,), 0.5), "uniform").item() == pytest.approx(expected.item())


def test_the_mean_masking_rate_is_that_of_the_rates() -> None:
    assert masking_rates(10_000, generator()).mean().item() == pytest.approx(MEAN_RATE, abs=1e-4)


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(weight: str) -> None:
    """Examples have different numbers of masked positions; a mean over each part's own would not add up."""
    logits, codes = example()
    rates = masking_rates(B, generator())
    z = mask_codes(codes, rates, generator())
    assert len({row.eq(-1).sum().item() for row in z}) > 1
    parts = [diffusion_loss(*(each[i : i + 2] for each in (logits, codes, z, rates)), weight) for i in range(0, B, 2)]
    assert torch.stack(parts).mean().item() == pytest.approx(diffusion_loss(logits, codes, z, rates, weight).item())


def test_elbo_normalised_by_l_not_by_masked_count() -> None:
    logits, codes = torch.zeros(B, L, K), torch.zeros(B, L, dtype=torch.long)
    rates = torch.full((B,), 0.5)
    z = codes.clone()
    z[:, 0] = -1
    loss = diffusion_loss(logits, codes, z, rates, "elbo")
    assert loss.item() == pytest.approx(math.log(K) / 0.5 / L)


def test_the_bound_of_a_uniform_model_is_its_likelihood() -> None:
    """In expectation over t and masks the ELBO weight gives log K a level, whatever the mask rates are."""
    n = 20_000
    codes = torch.zeros(n, L, dtype=torch.long)
    rates = masking_rates(n, generator())
    loss = diffusion_loss(torch.zeros(n, L, K), codes, mask_codes(codes, rates, generator(2)), rates, "elbo")
    assert loss.item() == pytest.approx(math.log(K), rel=0.05)


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_empty_mask_no_nan(weight: str) -> None:
    logits, codes = example()
    logits.requires_grad_()
    loss = diffusion_loss(logits, codes, codes, masking_rates(B, generator()), weight)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_impossible_codes_give_no_nan(weight: str) -> None:
    logits, codes = example()
    logits[:, :, K // 2 :] = float("-inf")
    codes = codes % (K // 2)
    logits.requires_grad_()
    z = mask_codes(codes, torch.full((B,), 0.5), generator())
    loss = diffusion_loss(logits, codes, z, torch.full((B,), 0.5), weight)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_small_t_bounded() -> None:
    rates = torch.cat([masking_rates(128, generator(seed)) for seed in range(50)])
    assert rates.min() >= EPSILON
    assert (1 / rates).max() <= 1 / EPSILON + 1e-3
    assert rates.max() <= 1


def test_rates_of_a_batch_are_antithetic() -> None:
    """One draw a batch, the others evenly spaced: every batch sees little and much masking."""
    rates = masking_rates(8, generator(5)).sort().values
    spacing = rates.diff()
    torch.testing.assert_close(spacing, torch.full((7,), (1 - EPSILON) / 8), rtol=1e-4, atol=1e-5)
    assert not torch.equal(masking_rates(8, generator(5)), masking_rates(8, generator(6)))


def test_codes_are_masked_at_their_rate() -> None:
    codes = torch.zeros(4, 50_000, dtype=torch.long)
    rates = torch.tensor([EPSILON, 0.25, 0.75, 1.0])
    share = (mask_codes(codes, rates, generator()) == -1).float().mean(1)
    torch.testing.assert_close(share, rates, rtol=0.05, atol=1e-3)
    assert share[3] == 1


def test_the_twin_loss_is_the_mean_log_likelihood() -> None:
    logits, codes = example()
    expected = -torch.log_softmax(logits, -1).gather(-1, codes.unsqueeze(-1)).mean()
    assert code_loss(logits, codes).item() == pytest.approx(expected.item())


def test_masks_depend_on_the_generator_alone() -> None:
    _, codes = example()
    torch.manual_seed(1)
    a = mask_codes(codes, masking_rates(B, generator(3)), generator(4))
    torch.manual_seed(2)
    b = mask_codes(codes, masking_rates(B, generator(3)), generator(4))
    assert torch.equal(a, b)


# Masking what the network is unsure of


def test_the_least_sure_levels_are_hidden_as_decoding_would_leave_them() -> None:
    codes = torch.arange(4).repeat(3, 1)
    log_probs = torch.log_softmax(torch.zeros(3, 4, 2), -1)
    log_probs[:, 2, 0], log_probs[:, 0, 1] = -0.01, -0.2
    rates = torch.tensor([0.01, 0.5, 1.0])
    z = mask_unsure(codes, rates, log_probs)
    # Levels 1 and 3 are equally unsure; decoding commits the lower one first, so the higher is hidden first.
    assert z.tolist() == [[0, 1, 2, -1], [0, -1, 2, -1], [-1, -1, -1, -1]]


# The loss that ranks docids


def test_scores_of_docids_are_sums_over_levels() -> None:
    logits, _ = example()
    log_probs, docids = torch.log_softmax(logits, -1), torch.randint(K, (9, L), generator=generator(3))
    wanted = [[sum(log_probs[b, i, code] for i, code in enumerate(row)) for row in docids.tolist()] for b in range(B)]
    torch.testing.assert_close(docid_scores(log_probs, docids), torch.tensor(wanted))


def test_a_docid_that_is_right_as_well_is_no_rival() -> None:
    scores, target = torch.tensor([[1.0, 5.0, 0.0]]), torch.tensor([0])
    alone = ranking_loss(scores, target, torch.tensor([[False, True, False]]))
    assert alone.item() == pytest.approx(math.log(1 + math.exp(-1.0)))
    assert ranking_loss(scores, target, torch.zeros(1, 3, dtype=torch.bool)).item() > 4


@pytest.mark.parametrize("name", PARADIGMS)
def test_learning_to_rank_raises_the_right_docid_above_the_others(name: str) -> None:
    """A table without a query: what is learned is the one docid of the examples, among all of them."""
    paradigm, config = PARADIGMS[name], LossConfig(ranking=1.0)
    docids = torch.randint(K, (20, L), generator=generator(5)).unique(dim=0)
    table = torch.zeros(L, K, requires_grad=True)
    codes = docids[3].repeat(B, 1)
    own = docids.repeat(B, 1, 1) if paradigm.causal else docids
    others = torch.zeros(B, len(docids), dtype=torch.bool)
    batch = {"codes": codes, "docids": own, "target": torch.full((B,), 3), "others": others}
    batch |= paradigm.corrupt(codes, generator(1))
    optimizer = torch.optim.SGD([table], lr=1.0)

    def ask(z: torch.Tensor) -> torch.Tensor:
        return table.expand(*z.shape[:-1], L, K)

    for _ in range(60):
        optimizer.zero_grad()
        paradigm.loss(ask, batch, config)["ranking"].backward()
        optimizer.step()
    scores = docid_scores(torch.log_softmax(table[None], -1), docids)[0]
    assert scores.argmax() == 3 and scores.softmax(-1)[3] > 0.9


def test_docids_agree_with_what_is_visible() -> None:
    docids = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 1, 2]])
    z = torch.tensor([[-1, -1, -1], [0, -1, 2], [-1, 1, -1], [2, -1, -1]])
    wanted = [[True, True, True], [True, True, False], [True, False, True], [False, False, False]]
    assert agree(docids, z).tolist() == wanted


def test_ranking_what_agrees_asks_nothing_about_docids_that_do_not() -> None:
    """With one code visible, docids that have it must be told apart; those of other first codes are left alone."""
    docids = torch.tensor([[0, 1], [0, 2], [1, 3]])
    table = torch.zeros(1, 2, 4, requires_grad=True)
    batch = {
        "codes": docids[:1], "z": torch.tensor([[0, -1]]), "rates": torch.tensor([0.5]), "docids": docids,
        "target": torch.tensor([0]), "others": torch.zeros(1, 3, dtype=torch.bool),
    }  # fmt: skip
    losses = PARADIGMS["diffusion"].loss(lambda z: table.expand(*z.shape[:-1], 2, 4), batch, LossConfig(agreeing=1.0))
    assert losses["agreeing"].item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(losses["agreeing"], table)
    torch.testing.assert_close(gradient[0, 0], torch.zeros(4))  # visible: the same for both that are left
    torch.testing.assert_close(gradient[0, 1], torch.tensor([0.0, -0.5, 0.5, 0.0]))
