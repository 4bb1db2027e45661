"""What a report warns of: likelihoods that rise on training questions alone, and places that give answers away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mobula.config import build
from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.experiment import Report
from mobula.rag.candidates import Candidates, shown
from mobula.rag.dro.asked import chosen, wording
from mobula.rag.dro.asked import measured as measures
from mobula.rag.dro.config import COLD, Config
from mobula.rag.dro.report import Findings, _warnings, fill

CONFIG = build(
    Config,
    {
        "method": "dro",
        "data": {"source": "nq"},
        "retrieve": {"candidates": 4, "choose": 2},
        "evaluation": {"resamples": 200},
    },
)


def measured(hit: float, chance: float = 0.25) -> dict[str, np.ndarray]:
    """Eight questions, one of which is answered yes."""
    told = wording(CONFIG, "header", False)
    found = {name: np.full(8, 0.5) for name in told.measures} | {"hit@1": np.full(8, hit), "hit@2": np.full(8, hit)}
    found["chance"] = np.full(8, chance)
    for name in ("hit@1", "hit@2", "chance"):
        found[name][3] = np.nan
    return found


def report(rows: list[list[dict[str, Any]]], first_shown: float = 0.25) -> Report:
    shown = {"dev_hit@1": 0.1, "dev_hit@2": 0.1, "dev_f1": 0.1}
    runs = [[{**shown, **row} for row in run] for run in rows]
    tests = {
        COLD: measured(0.3),
        "cold_start, passages retriever": measured(0.4),
        "cold_start, passages first": measured(first_shown),
        "dro": measured(0.6),
    }
    findings = Findings(
        CONFIG, wording(CONFIG, "header", False), {"dro": runs}, {n: [v] for n, v in tests.items()}, [], []
    )
    made = Report("dro", "x", 0, "0")
    fill(made, findings)
    return made


def likelihoods(train: list[float], dev: list[float]) -> list[dict[str, float]]:
    return [
        {"dev_iwae_bound": dev[0]},
        *({"iwae_bound": a, "dev_iwae_bound": b} for a, b in zip(train, dev[1:], strict=True)),
    ]


# Samples of training questions are those of the networks before an iteration's M-step: the first row has none, and the
# last row's dev questions are answered by networks that have no training samples yet.
@pytest.mark.parametrize(
    ("train", "dev", "named"),
    [
        ([-5, -4], [-5, -6, -6], True),
        ([-5, -4], [-5, -4.5, -6], False),
        ([-5, -6], [-5, -6, -6], False),
        ([-5, -4], [-5, -4, -9], False),
    ],
)
def test_a_likelihood_that_rises_on_training_questions_alone_is_over_fitting(
    train: list[float], dev: list[float], named: bool
) -> None:
    notes = report([likelihoods(train, dev)]).notes
    assert any("dro: over-fitted, bound rose by 1.000 nats" in note for note in notes) == named


@pytest.mark.parametrize(("first", "named"), [(0.25, False), (0.3, False), (0.9, True)])
def test_places_that_give_answers_away_are_named(first: float, named: bool) -> None:
    notes = report([likelihoods([-5, -4], [-5, -4, -4])], first).notes
    assert any("the first of them holds it in 90% of the questions, one at random in 25%" in n for n in notes) == named


def test_claims_are_about_hits_over_questions_that_have_any() -> None:
    claims = {claim.name: claim for claim in report([likelihoods([-5, -4], [-5, -4, -4])]).claims}
    beats = claims["dro - cold_start, passages retriever, hit@1"]
    assert (beats.effect, beats.n, beats.verdict) == (pytest.approx(0.2), 7, "holds")
    assert {"dro - cold_start, hit@1", "dro - cold_start, hit@2", "dro - cold_start, passages retriever, hit@2"} <= set(
        claims
    )


def test_recall_stands_beside_hits_where_support_is_known() -> None:
    hotpotqa = build(Config, {"method": "dro", "data": {"source": "hotpotqa"}})
    assert {"hit@1", "recall", "all_gold"} <= set(wording(hotpotqa, "header", False).measures)
    assert "recall" not in wording(CONFIG, "header", False).measures


@pytest.mark.parametrize(("order", "named"), [("retriever", True), ("shuffled", False)])
def test_a_retriever_that_ranks_golds_first_gives_them_away_unless_they_are_shuffled(order: str, named: bool) -> None:
    """From candidates as they are shown to the note of the report."""
    documents = [Document("d0", "t", "Oslo is here."), *(Document(f"d{i}", "t", "nothing") for i in range(1, 4))]
    candidates = Candidates({}, documents, np.zeros((4, 2), dtype=np.float32))
    ids = [document.id for document in documents]
    asked = [shown(Question(f"q{i}", f"where is it {i}", ("Oslo",), ()), ids, "", order, 0) for i in range(60)]
    first = measures(candidates, asked, [chosen(candidates, one, "first", 2) for one in asked], ["x"] * 60, 2)
    tests = {COLD: [measured(0.3)], "dro": [measured(0.6)], "cold_start, passages first": [first]}
    told = Findings(CONFIG, wording(CONFIG, "header", False), {"dro": [[]]}, tests, [], [])
    assert any("where passages are shown gives the answer away" in note for note in _warnings(told)) == named
