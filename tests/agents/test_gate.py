"""The gate: what it accepts, what it rejects and why, and tolerances that mean something."""

from __future__ import annotations

import numpy as np
import pytest

from mobula.agents.gate import AgentScores, GateConfig, decide, tolerance

FAMILIES = ["arith", "kb", "shop"] * 100
CONFIG = GateConfig()


def standing(success: float = 0.5, surrogate: float = -0.4, leak: float = 0.0, parsed: float = 1.0) -> AgentScores:
    """Success on the first tasks of every family, and a surrogate that varies from task to task."""
    wins = np.array([float(i // 3 < success * 100) for i in range(300)])
    return AgentScores(surrogate + 0.1 * np.sin(np.arange(200)), wins, leak, parsed)


def test_no_change_and_better_are_accepted() -> None:
    assert decide(CONFIG, standing(), standing(), FAMILIES).accepted
    assert decide(CONFIG, standing(), standing(0.7, -0.3), FAMILIES).accepted


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (standing(surrogate=-0.5), "surrogate fell by 0.1000"),
        (standing(success=0.35), "dev success -0.150"),
        (standing(leak=0.3), "30% of the plans leak"),
        (standing(parsed=0.2), "20% of the plans parse"),
    ],
)
def test_worse_is_rejected_with_its_reason(after: AgentScores, reason: str) -> None:
    decision = decide(CONFIG, standing(), after, FAMILIES)
    assert not decision.accepted
    assert any(text.startswith(reason) for text in decision.reasons)
    assert decide(GateConfig(enabled=False), standing(), after, FAMILIES).accepted


def test_one_family_that_collapses_is_enough() -> None:
    after = standing(0.6)
    rows = np.array(FAMILIES) == "kb"
    after.success[rows] = 0
    reasons = decide(CONFIG, standing(), after, FAMILIES).reasons
    assert any(reason.startswith("success in kb -0.500") for reason in reasons)
    assert not any("arith" in reason for reason in reasons)


def test_a_surrogate_may_fall_within_its_noise() -> None:
    noise = np.random.default_rng(0).normal(0, 0.5, 200)
    before = standing()
    after = AgentScores(before.surrogate - 0.01 + noise - noise.mean(), before.success, 0.0, 1.0)
    assert decide(CONFIG, before, after, FAMILIES).accepted
    strict = decide(GateConfig(j_slack_se=0.0), before, after, FAMILIES)
    assert strict.reasons[0].startswith("surrogate fell by 0.0100")


def test_tolerances_that_cannot_be_told_from_chance_are_refused() -> None:
    assert tolerance(None, 300, 0.05) == pytest.approx(0.0506, abs=1e-4)
    assert tolerance(None, 100_000, 0.05) == 0.05
    assert tolerance(0.1, 300, 0.05) == 0.1
    with pytest.raises(ValueError, match="cannot be told from chance with 300 tasks"):
        tolerance(0.01, 300, 0.05)
    with pytest.raises(ValueError, match="100 tasks"):
        decide(GateConfig(delta_family=0.02), standing(), standing(), FAMILIES)
