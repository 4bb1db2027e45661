"""Weights of sampled latents: hand-made cases of every rule, and what leaves before normalisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mobula.config import build
from mobula.errors import ConfigError
from mobula.rag.weights import RULES, Sampled, WeightConfig, weigh


def sampled(log_lik: list[float], tokens: int = 1, **more: Any) -> Sampled:
    zeros = [0.0] * len(log_lik)
    parts = {name: np.array(more.get(name, zeros)) for name in ("log_ratio", "reward", "exact")}
    return Sampled(np.array(log_lik), tokens, **parts)


def values(log_lik: list[float], rule: str = "snis", tokens: int = 1, **more: Any) -> list[float]:
    return weigh(sampled(log_lik, tokens, **more), WeightConfig(rule=rule)).values.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_the_likelier_the_answer_the_larger_the_weight(rule: str) -> None:
    log_lik = [-3.0, -1.0, -2.0, -7.0]
    found = values(log_lik, rule, reward=[0.2, 1, 0.5, 0], exact=[0, 1, 0, 0])
    assert np.argmax(found) == (0 if rule == "uniform" else 1)
    if rule not in ("unnormalised", "lik_mean_exp"):
        assert sum(found) == pytest.approx(0 if rule in ("advantage", "reinforce") else 1)


def test_advantages_are_relative_to_the_group_and_nothing_where_all_are_alike() -> None:
    found = values([-1.0] * 4, "advantage", reward=[1, 0, 0, 0])
    assert found == pytest.approx([3**0.5 / 4, *[-(3**-0.5) / 4] * 3], abs=1e-5)
    alike = weigh(sampled([-1.0] * 4, reward=[1.0] * 4), WeightConfig(rule="advantage"))
    assert alike.skipped == "no sample has a reward" and not alike.values.any()


def test_answers_of_one_and_of_six_tokens() -> None:
    ratio = np.exp(-2.0)  # sums that differ by 2 nats
    assert values([-1.0, -3.0]) == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio)])
    # A sum over tokens, not their mean: the same sums weigh alike however long the answer is.
    assert values([-1.0, -3.0], tokens=6) == values([-1.0, -3.0])
    flat = np.exp(-2.0 / 6)
    assert values([-1.0, -3.0], "snis_len", tokens=6) == pytest.approx([1 / (1 + flat), flat / (1 + flat)])
    assert values([-300.0, -305.0]) == pytest.approx([0.9933, 0.0067], abs=1e-4)


def test_rules_that_are_not_normalised() -> None:
    assert values([np.log(0.5), np.log(0.1)], "unnormalised") == pytest.approx([0.25, 0.05])
    assert values([2 * np.log(0.5), 2 * np.log(0.1)], "lik_mean_exp", tokens=2) == pytest.approx([1.0, 0.2])


def test_one_sample_has_no_signal_unless_raw() -> None:
    assert values([-5.0]) == values([-5.0], "uniform") == [1.0]
    assert values([-5.0], "unnormalised") == pytest.approx([np.exp(-5)])


def test_a_policy_gradient_compares_each_reward_with_the_others() -> None:
    zeros = [-1.0] * 4
    assert values(zeros, "reinforce", exact=[1, 0, 0, 0]) == pytest.approx([1 / 4, -1 / 12, -1 / 12, -1 / 12])
    alike = weigh(sampled(zeros, exact=[1.0] * 4), WeightConfig(rule="reinforce"))
    assert alike.skipped == "no sample has a reward" and not alike.values.any()
    assert values([-1.0], "reinforce", exact=[1.0]) == [0.0]


def test_the_first_of_the_best_wins() -> None:
    assert values([-2.0, -1.0, -1.0], "best") == [0, 1, 0]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_has_no_likelihood_leaves_before_normalisation(bad: float) -> None:
    found = values([-1.0, bad, -2.0, -3.0])
    assert found[1] == 0
    assert sum(found) == pytest.approx(1)
    assert [found[0], found[2], found[3]] == pytest.approx(values([-1.0, -2.0, -3.0]))
    nothing = weigh(sampled([bad, bad]), WeightConfig())
    assert nothing.skipped == "no sample has a finite likelihood"
    assert nothing.values.tolist() == [0, 0]


@pytest.mark.parametrize("rule", ["reward", "binary"])
def test_a_query_without_a_reward_is_skipped_and_not_weighed_uniformly(rule: str) -> None:
    found = weigh(sampled([-1.0, -2.0]), WeightConfig(rule=rule))
    assert (found.skipped, found.values.tolist()) == ("no sample has a reward", [0, 0])


def test_duplicates_count_as_often_as_they_were_drawn() -> None:
    apart = values([-1.0, -1.0, -2.0])
    counted = np.array([2 * np.exp(-1.0), np.exp(-2.0)])
    assert [apart[0] + apart[1], apart[2]] == pytest.approx(list(counted / counted.sum()))
    once = values([-1.0, -2.0])
    assert once[0] != pytest.approx(apart[0] + apart[1])


def test_gates_act_on_queries_that_every_sample_fails() -> None:
    failing, passing = sampled([-9.0, -8.0], tokens=2), sampled([-9.0, -1.0], tokens=2)
    assert weigh(failing, WeightConfig()).all_fail
    assert not weigh(passing, WeightConfig()).all_fail
    assert weigh(failing, WeightConfig(gate="skip")).skipped == "every sample fails"
    assert weigh(passing, WeightConfig(gate="skip")).values.sum() == pytest.approx(1)
    assert weigh(failing, WeightConfig(gate="scale")).values.sum() == pytest.approx(np.exp(-4))
    # Softmax alone makes tiny likelihoods look decided.
    assert values([np.log(1e-9), np.log(1e-10)]) == pytest.approx([0.909, 0.091], abs=1e-3)


def test_effective_sample_size_and_bound() -> None:
    even, uneven = weigh(sampled([-1.0] * 4), WeightConfig()), weigh(sampled([0.0, -50, -50, -50]), WeightConfig())
    assert even.ess == pytest.approx(4)
    assert uneven.ess == pytest.approx(1)
    assert even.log_mean_lik == pytest.approx(-1)
    assert uneven.log_mean_lik == pytest.approx(-np.log(4))
    assert weigh(sampled([-1.0, -1.0, np.nan, -1.0]), WeightConfig()).ess == pytest.approx(3)


def test_the_correction_is_applied_only_when_asked_for() -> None:
    rows = sampled([-1.0, -1.0], log_ratio=[0.0, np.log(3)])
    assert weigh(rows, WeightConfig()).values == pytest.approx([0.5, 0.5])
    assert weigh(rows, WeightConfig(correction="exact")).values == pytest.approx([0.25, 0.75])


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rule=nll is unknown; expected snis, "):
        build(WeightConfig, {"rule": "nll"})
