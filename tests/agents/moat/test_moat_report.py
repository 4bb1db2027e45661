"""Claims of the report that are MOAT's own."""

from __future__ import annotations

import numpy as np
import pytest

from mobula.agents.moat.report import gap_closes
from mobula.study import Results, StudyConfig, StudyEvaluation, System


@pytest.mark.parametrize(
    ("before", "after", "effect", "verdict"),
    [
        (0.30, 0.05, 0.25, "holds"),
        (0.30, -0.05, 0.25, "holds"),
        (-0.008, -0.141, -0.133, "does_not_hold"),  # it has opened on the other side
        (0.10, -0.30, -0.20, "does_not_hold"),
    ],
)
def test_a_gap_closes_if_its_size_shrinks_whatever_its_sign(
    before: float, after: float, effect: float, verdict: str
) -> None:
    config = StudyConfig(arms=["moat"], evaluation=StudyEvaluation(seeds=3, resamples=500))
    results = Results(config, {System("moat"): [[{"query": "a"}]] * 3}, {})
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 200))
    noise -= noise.mean()
    claim = gap_closes(results, "C8 gap_s", "success", before + noise, after - noise)
    assert claim.effect == pytest.approx(effect, abs=1e-6)
    assert claim.verdict == verdict
