"""Weights the wrong way round teach worse than none: a bug of published code, as a control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mobula.alternation import AlternationConfig
from mobula.rag import weights
from mobula.rag.dro.config import Config, EvaluationConfig
from mobula.rag.dro.study import Arms

pytestmark = [pytest.mark.end_to_end, pytest.mark.alone, pytest.mark.timeout(1200)]


def em_after(directory: Path, rule: str) -> float:
    config = Config(method="dro", alternation=AlternationConfig(iterations=4, actors=0), evaluation=EvaluationConfig())
    config.em.weights = replace(config.em.weights, rule=rule)
    return Arms(config, directory).outcome("dro", 0).rows[-1]["dev_em"]


def test_inverted_weights_end_below_uniform_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inverted(sampled: weights.Sampled, tau: float) -> np.ndarray:
        return -sampled.log_lik / -sampled.log_lik.sum()

    monkeypatch.setitem(weights.RULES, "inverted", inverted)
    em = {rule: em_after(tmp_path / rule, rule) for rule in ("snis", "uniform", "inverted")}
    assert em["inverted"] < em["uniform"] < em["snis"], em
