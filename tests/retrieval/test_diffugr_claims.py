"""Every claim of the spec is made of the systems that a run evaluates, and of no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mobula.config import build
from mobula.data.records import Query
from mobula.errors import MobulaError
from mobula.experiment import Claim
from mobula.retrieval.claims import Claims
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import Recovery
from mobula.retrieval.docids.families import FAMILIES, Family
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.results import Outcome, Split
from mobula.retrieval.systems import DECODINGS, Decoded, decoded, systems
from mobula.study import System

QUERIES = 40
ARMS = ["diffusion/rq", "autoregressive/rq", "classifier/rq", "diffusion/random"]
SPEC = {
    "A-rerank", "A-match", "A-raw none", "A-raw low_conf", "B-threshold tau=0.5", "B-threshold tau=0.9",
    "C-latency beam 10", "C-latency beam 100", "D-recovery none", "D-recovery low_conf", "E-outperforms beam 100",
    "E-outperforms exhaustive", "E-competitive beam 100", "E-competitive exhaustive", "F-rerank", "F-beam",
    "F-best_of_n", "F-chain", "G-hamming", "G-adc", "G-adc seen", "G-adc unseen", "G-random",
}  # fmt: skip


def configured(arms: list[str] = ARMS, **evaluation: Any) -> Config:
    evaluation = {"resamples": 100, "thresholds": [0.5, 0.9], **evaluation}
    return build(Config, {"method": "diffugr", "arms": arms, "docid": {"levels": 4}, "evaluation": evaluation})


def outcome(rng: np.random.Generator) -> Outcome:
    values = (rng.random(QUERIES) < 0.5).astype(float)
    measured = {"Hit@10": [values], "Hit@1": [values], "raw_exact": [(rng.random(QUERIES) < 0.5).astype(float)]}
    return Outcome(measured, [np.full(QUERIES, 2.0)], {"steps": [2.0]}, rng.random(QUERIES) + 1.0)


def measured(config: Config, documents: int = 100, without: str = "", tuned: bool = True) -> Claims:
    """What a run leaves: an outcome of every system that the configuration asks for, but for those labelled so."""
    rng = np.random.default_rng(0)
    split = Split("test", [Query(str(i), "?", ("d",)) for i in range(QUERIES)], documents, None, 100)
    baselines = [System(name) for name in ("bm25", "dense", "dual")]
    if config.main.docids.is_quantised:
        baselines += [System("hamming"), System("adc")]
    split.outcomes = {s: outcome(rng) for s in [*baselines, *systems(config, documents)] if s.label != without}
    recovered: dict[Decoded, list[Recovery]] = {
        decoded(config.main, remask=rule): [_recovery(rng)] for rule in config.evaluation.remask
    }
    if config.twin is not None:
        recovered[decoded(config.twin, decoder="beam", beam=10)] = [_recovery(rng)]
    seen = np.arange(QUERIES) % 4 > 0
    return Claims(config, split, decoded(config.main, decoder="one_pass"), recovered, seen, tuned)


def _recovery(rng: np.random.Generator) -> Recovery:
    return Recovery(rng.random(QUERIES) < 0.3, rng.random(QUERIES) < 0.6)


def made(claims: Claims) -> dict[str, Claim]:
    found = list(claims.all())
    assert len({claim.name for claim in found}) == len(found)
    return {claim.name: claim for claim in found}


def test_every_claim_of_the_spec_is_made_when_its_arms_ran() -> None:
    assert made(measured(configured())).keys() == SPEC


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"beams": [10]}, {"C-latency beam 100", "E-outperforms beam 100", "E-competitive beam 100"}),
        ({"exhaustive": 0}, {"E-outperforms exhaustive", "E-competitive exhaustive"}),
        ({"thresholds": []}, {"B-threshold tau=0.5", "B-threshold tau=0.9"}),
        (
            {"decoders": ["match_rerank"]},
            {"A-match", "A-raw none", "A-raw low_conf", "B-threshold tau=0.5", "B-threshold tau=0.9"},
        ),
        ({"remask": ["none"]}, {"D-recovery low_conf", "A-raw low_conf"}),
    ],
)
def test_only_what_the_experiment_leaves_out_is_not_claimed(changes: dict[str, Any], gone: set[str]) -> None:
    assert made(measured(configured(**changes))).keys() == SPEC - gone


def test_without_a_twin_or_a_control_their_claims_are_left_out() -> None:
    names = made(measured(configured(["diffusion/rq"]))).keys()
    assert names == {name for name in SPEC if name[0] in "ABF"} | {"G-hamming", "G-adc", "G-adc seen", "G-adc unseen"}


def test_a_twin_whose_rate_nothing_chose_decides_nothing() -> None:
    claims, undecided = made(measured(configured())), made(measured(configured(), tuned=False))
    for name in (name for name in SPEC if name[0] == "E"):
        assert undecided[name].verdict == "undecided"
        assert undecided[name].statement.endswith("; dev preferred none of the twin's learning rates to another")
        assert (undecided[name].effect, undecided[name].low) == (claims[name].effect, claims[name].low)


def test_thresholds_are_compared_at_as_many_network_calls() -> None:
    """Quality that rises with the calls, a threshold that takes 3 of them and is as good as a budget of 3 would be."""
    config = configured(thresholds=[0.5])
    claims = measured(config)
    outcomes = claims.test.outcomes
    for steps in (1, 2, 4):
        fixed = outcomes[decoded(config.main, decoder="match", steps=steps)]
        fixed.values["Hit@10"], fixed.calls = [np.full(QUERIES, steps / 10)], [np.full(QUERIES, float(steps))]
    ours = outcomes[decoded(config.main, decoder="match", threshold=0.5)]
    for quality, effect in ((0.3, 0.0), (0.35, 0.05)):
        ours.values["Hit@10"], ours.calls = [np.full(QUERIES, quality)], [np.tile([2.0, 4.0], QUERIES // 2)]
        claim = made(claims)["B-threshold tau=0.5"]
        assert claim.effect == pytest.approx(effect)
    # The calls are resampled with the queries, so the level they are compared at is not certain.
    assert claim.low < 0.05 < claim.high


def test_recovery_is_of_the_docid_and_not_of_the_ranking() -> None:
    claims = measured(configured())
    (one,) = claims.recovered[decoded(claims.config.main, remask="none")]
    claims.recovered[decoded(claims.config.main, remask="none")][0] = Recovery(np.zeros_like(one.final), one.top)
    assert made(claims)["D-recovery none"].effect < 0


@pytest.mark.parametrize(
    "label", ["diffusion/rq match_rerank T=4", "autoregressive/rq beam 100", "adc", "diffusion/rq beam"]
)
def test_a_system_that_should_have_been_measured_and_was_not_is_an_error(label: str) -> None:
    with pytest.raises(MobulaError, match="was not measured"):
        list(measured(configured(), without=label).all())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_but_atomic_appears_in_the_claims_on_docids(family: Family) -> None:
    main = "rq" if family.is_control else family.name
    claims = measured(configured([f"diffusion/{main}", f"diffusion/{family.name}", "diffusion/random"]))
    compared = [(c.better, c.worse) for c in claims.comparisons() if c.when and c.name.startswith("G-")]
    appears = any(system.arm == f"diffusion/{family.name}" for pair in compared for system in pair)
    assert appears == (family.name != "atomic")  # its one code is the document's number: a classifier


def test_the_paradigms_have_their_decodings() -> None:
    assert DECODINGS.keys() == PARADIGMS.keys()


def test_a_system_is_its_value() -> None:
    arm = configured().main
    a, b = decoded(arm, steps=4, decoder="match"), decoded(arm, decoder="match", steps=4)
    assert a == b and hash(a) == hash(b)
    assert (a.label, a.slug) == ("diffusion/rq match T=4", "diffusion-rq-match-T=4")
    assert decoded(arm, decoder="match", threshold=0.5).label == "diffusion/rq match tau=0.5"
    with pytest.raises(ValueError, match="found mc"):
        decoded(arm, mc=3)


def test_labels_tell_all_systems_apart() -> None:
    every = systems(configured(), 100)
    assert len({system.label for system in every}) == len(every)
    assert len({system.slug for system in every}) == len(every)
