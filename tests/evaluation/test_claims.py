"""Claims and their verdicts."""

import numpy as np
import pytest
from scipy import stats

from mobula.errors import MobulaError
from mobula.evaluation.claims import always, compare, equivalent, exceeds, holm, holm_by_statement, verdict
from mobula.evaluation.intervals import matched_level
from mobula.experiment import Claim


def test_verdicts():
    assert verdict(0.01, 0.1) == "holds"
    assert verdict(-0.1, -0.01) == "does_not_hold"
    assert verdict(-0.1, 0.1) == "undecided"
    assert verdict(0.01, 0.1, decisive=False) == "undecided"
    assert verdict(-0.01, 0.1, margin=0.02) == "holds"
    assert verdict(-0.1, -0.03, margin=0.02) == "does_not_hold"
    assert verdict(-0.1, 0.1, margin=0.02) == "undecided"


def test_claim_from_paired_values():
    a, b = np.ones(50), np.zeros(50)
    claim = compare("E", "a exceeds b", a, b)
    assert (claim.effect, claim.n, claim.verdict) == (1.0, 50, "holds")
    assert compare("E", "b exceeds a", b, a).verdict == "does_not_hold"
    assert compare("E", "a exceeds b", a, b, decisive=False).verdict == "undecided"
    # Equal systems: neither exceeds the other, and neither is worse by a margin.
    assert compare("E", "a exceeds b", a, a).verdict == "undecided"
    assert compare("E", "a is not worse", a, a, margin=0.01).verdict == "holds"


@pytest.mark.parametrize(
    ("values", "least", "verdict"),
    [([0.2, 0.1], 0.0, "holds"), ([0.2, 0.0], 0.0, "does_not_hold"), ([0.2, -0.01], -0.02, "holds")],
)
def test_one_value_that_is_too_small_refutes_that_all_are_large(
    values: list[float], least: float, verdict: str
) -> None:
    claim = always("E", "all are large", values, least=least)
    assert (claim.verdict, claim.low, claim.high, claim.n) == (verdict, min(values), max(values), 2)
    assert always("E", "all are large", values, least=least, decisive=False).verdict == "undecided"


def test_p_value_and_verdict_agree():
    rng = np.random.default_rng(0)
    for values in (rng.normal(0.2, 1, size=80), rng.normal(0.5, 1, size=(4, 30)), rng.normal(0, 1, size=(3, 50))):
        for margin in (0.0, 0.1, 0.3):
            claim = compare("E", "a exceeds b", values, np.zeros(values.shape[-1]), margin=margin, resamples=2000)
            assert claim.p is not None and (claim.p < 0.05) == (claim.verdict != "undecided")


def test_p_value_is_that_of_the_t_test_where_queries_do_not_vary():
    seeds = np.array([0.1, 0.3, 0.2, 0.05, 0.15])
    claim = compare("E", "a exceeds b", np.repeat(seeds[:, None], 40, axis=1), np.zeros(40))
    assert claim.p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue, rel=1e-3)


def test_equivalence_is_shown_refuted_or_left_open():
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    noise = rng.normal(0, 0.1, size=400)
    close = equivalent("E", "a equals b", b + noise, b, 0.05)
    assert close.verdict == "holds" and close.p is not None and close.p < 0.05
    far = equivalent("E", "a equals b", b + noise + 0.2, b, 0.05)
    assert far.verdict == "does_not_hold" and far.p is not None and far.p < 0.05
    few = equivalent("E", "a equals b", (b + 10 * noise)[:30], b[:30], 0.05)
    assert few.verdict == "undecided" and few.p is not None and few.p > 0.05
    assert equivalent("E", "a equals b", b + noise, b, 0.05, decisive=False).verdict == "undecided"
    with pytest.raises(MobulaError, match="margin > 0"):
        equivalent("E", "a equals b", b, b, 0.0)


def test_equivalence_wants_the_interval_that_is_shown_inside_the_margin():
    b = np.zeros(400)
    a = np.random.default_rng(0).normal(0, 1, size=400)
    low, high = (claim := compare("E", "a exceeds b", a, b)).low, claim.high
    widest = max(-low, high)
    assert equivalent("E", "a equals b", a, b, widest + 1e-6).verdict == "holds"
    assert equivalent("E", "a equals b", a, b, widest - 1e-6).verdict == "undecided"


def test_holm_is_the_step_down():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=100)
    family = [
        compare(name, "exceeds", reference + rng.normal(shift, 1, size=100), reference)
        for name, shift in (("A", 0.2), ("B", 0.8), ("C", 0.25), ("D", 0.0))
    ]
    adjusted = holm(family)
    assert [claim.name for claim in adjusted] == ["A", "B", "C", "D"]
    order = sorted(range(4), key=lambda i: family[i].p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (4 - rank) * family[i].p))
        assert adjusted[i].p == pytest.approx(least)
        assert adjusted[i].verdict == (family[i].verdict if least <= 0.05 else "undecided")
        assert (adjusted[i].low, adjusted[i].high) == (family[i].low, family[i].high)
    assert adjusted[1].verdict == "holds"


def test_a_comparison_that_is_one_of_many_needs_more():
    values = np.random.default_rng(3).normal(size=100)
    values = (values - values.mean()) / values.std() + 0.25
    claim = compare("E", "exceeds", values, np.zeros(100))
    assert claim.verdict == "holds"
    assert holm([claim])[0] == claim
    assert {found.verdict for found in holm([claim] * 20)} == {"undecided"}
    with pytest.raises(MobulaError, match="p-values; F have none"):
        holm([claim, always("F", "all are large", [0.1])])


def test_clusters_reach_the_claim():
    values = np.repeat(np.random.default_rng(1).normal(0.6, 1, size=10), 10)
    labels = np.repeat(np.arange(10), 10)
    alone = compare("E", "exceeds", values, np.zeros(100))
    together = compare("E", "exceeds", values, np.zeros(100), clusters=labels)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert together.effect == pytest.approx(alone.effect)


def test_claim_at_a_matched_level():
    rng = np.random.default_rng(0)
    x = np.array([[1.0], [2.0], [4.0]]) + np.zeros((1, 3, 80))
    y = np.array([[0.1], [0.3], [0.7]]) + rng.normal(0, 0.1, size=(4, 3, 80))
    further = 1.5 * x  # the same quality at half as many calls again
    claim = exceeds("E", "a is better at equal calls", matched_level((x, y), (further, y)))
    # At 4 calls: 0.7 against 0.3 + 0.4 / 3 at 4 of [3, 6] calls.
    assert claim.effect == pytest.approx(0.7 - (0.3 + 0.4 / 3), abs=0.03)
    assert claim.verdict == "holds"


def test_claims_that_speak_for_one_statement_are_corrected_together():
    """p = 0.03 holds alone and not as one of two; another statement's claims, and those without p, do not count."""

    def claim(name: str, p: float | None) -> Claim:
        return Claim(name, "exceeds", 1.0, 0.1, 1.9, 100, "holds", p)

    made = [claim("F1 a b", 0.03), claim("K dense", 0.03), claim("F1 a c", 0.2), claim("monotone", None)]
    found = holm_by_statement(made)
    assert [one.name for one in found] == [one.name for one in made]
    assert [one.p for one in found] == [pytest.approx(0.06), 0.03, 0.2, None]
    assert [one.verdict for one in found] == ["undecided", "holds", "undecided", "holds"]
