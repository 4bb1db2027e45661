"""What a report warns of: likelihoods that rise on training questions alone, and positions that give answers away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mobula.config import build
from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.experiment import Report
from mobula.rag.candidates import Candidates, as_shown
from mobula.rag.dro.config import COLD, Config
from mobula.rag.dro.study import claims as claims_of
from mobula.rag.dro.study import fill, metrics, warnings
from mobula.rag.selections import RANDOM_HIT, measured, selected
from mobula.study import Results, System

CONFIG = build(
    Config,
    {
        "method": "dro",
        "data": {"source": "nq"},
        "retrieve": {"candidates": 4, "choose": 2},
        "evaluation": {"resamples": 200},
    },
)
BASELINES = CONFIG.passage_baselines()


def evaluated(hit: float, random: float = 0.25) -> list[dict[str, Any]]:
    """Eight questions, one of which is answered yes."""
    row = {**dict.fromkeys(metrics(CONFIG), 0.5), "tau": 0.5, "hit@1": hit, "hit@2": hit, RANDOM_HIT: random}
    closed = {**row, "hit@1": None, "hit@2": None, RANDOM_HIT: None}
    return [{"query": i, **(closed if i == 3 else row)} for i in range(8)]


def results(runs: list[list[dict[str, Any]]], first_shown: list[dict[str, Any]]) -> Results:
    tests = {
        System("dro"): evaluated(0.6),
        System(COLD): evaluated(0.3),
        BASELINES["retriever"]: evaluated(0.4),
        BASELINES["first"]: first_shown,
    }
    return Results(CONFIG, {system: [rows] for system, rows in tests.items()}, {"dro": runs})


def report(runs: list[list[dict[str, Any]]], first_shown: float = 0.25) -> Report:
    of_dev = {"dev_hit@1": 0.1, "dev_hit@2": 0.1, "dev_f1": 0.1}
    made = Report("dro", "x", 0, "0")
    fill(made, results([[{**of_dev, **row} for row in run] for run in runs], evaluated(first_shown)), [], [])
    return made


def likelihoods(train: list[float], dev: list[float]) -> list[dict[str, float]]:
    later = [{"iwae_bound": a, "dev_iwae_bound": b} for a, b in zip(train, dev[1:], strict=True)]
    return [{"dev_iwae_bound": dev[0]}, *later]


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
    assert any("dro: over-fitted, iwae_bound rose by 1.000 nats" in note for note in notes) == named


@pytest.mark.parametrize(("first", "named"), [(0.25, False), (0.3, False), (0.9, True)])
def test_positions_that_give_answers_away_are_named(first: float, named: bool) -> None:
    notes = report([likelihoods([-5, -4], [-5, -4, -4])], first).notes
    assert any("the first of them holds it in 90% of the questions, one at random in 25%" in n for n in notes) == named


def test_claims_are_about_hits_over_questions_that_have_any() -> None:
    made = report([likelihoods([-5, -4], [-5, -4, -4])])
    claims = {claim.name: claim for claim in made.claims}
    beats = claims["dro - cold_start, passages retriever, hit@1"]
    assert (beats.effect, beats.n, beats.verdict) == (pytest.approx(0.2), 7, "holds")
    assert {"dro - cold_start, hit@1", "dro - cold_start, hit@2", "dro - cold_start, passages retriever, hit@2"} <= set(
        claims
    )
    assert made.measures["dro/tau"].value == 0.5


def test_an_arm_without_a_selector_of_its_own_is_compared_by_its_answers() -> None:
    """By hits it would be the retriever's order a second time, whatever its generator has learned."""
    answered = [{**row, "f1": 0.4 if row["hit@1"] is not None else 0.5} for row in evaluated(0.4)]
    made = results([likelihoods([-5, -4], [-5, -4, -4])], evaluated(0.25))
    made.rows[System("rag_sft")] = [answered]
    claims = {claim.name: claim for claim in claims_of(made, [])}
    named = sorted(name for name in claims if name.startswith("dro - rag_sft"))
    assert named == ["dro - rag_sft, exact", "dro - rag_sft, f1"]
    assert claims["dro - rag_sft, f1"].effect == pytest.approx(0.1 * 7 / 8)


def test_recall_stands_beside_hits_where_support_is_known() -> None:
    hotpotqa = build(Config, {"method": "dro", "data": {"source": "hotpotqa"}})
    assert {"hit@1", "recall", "all_gold"} <= set(metrics(hotpotqa))
    assert "recall" not in metrics(CONFIG)


@pytest.mark.parametrize(("order", "named"), [("retriever", True), ("shuffled", False)])
def test_a_retriever_that_ranks_golds_first_gives_them_away_unless_they_are_shuffled(order: str, named: bool) -> None:
    """From candidates as they are shown to the note of the report."""
    documents = [Document("d0", "t", "Oslo is here."), *(Document(f"d{i}", "t", "nothing") for i in range(1, 4))]
    candidates = Candidates({}, documents, np.zeros((4, 2), dtype=np.float32))
    ids = [document.id for document in documents]
    requests = [as_shown(Question(f"q{i}", f"where is it {i}", ("Oslo",), ()), ids, "", order, 0) for i in range(60)]
    first = [
        {"query": i, **measured(candidates, one, selected(candidates, one, "first", 2), "x", 2)}
        for i, one in enumerate(requests)
    ]
    notes = list(warnings(Results(CONFIG, {BASELINES["first"]: [first]}, {"dro": [[]]})))
    assert any("where passages are shown gives the answer away" in note for note in notes) == named
