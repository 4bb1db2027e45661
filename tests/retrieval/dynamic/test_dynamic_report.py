"""Claims on values made by hand, so that every verdict is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobula.config import build
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.sessions import SessionPlan, SessionRow
from mobula.experiment import Claim, Report
from mobula.retrieval.docids.families import FAMILIES, Family
from mobula.retrieval.dynamic.claims import claims
from mobula.retrieval.dynamic.config import Config, SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import INITIAL_SHARE, ORACLE, EvaluationProtocol, SessionResults
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.report import build_report
from mobula.retrieval.dynamic.results import Results

ROWS, SESSIONS = 200, 3
SYSTEMS = ("bm25", "dense", "adc/rq", "autoregressive/rq", "autoregressive/multi_chunk", "ngram", "dual")


def _results(quality: dict[str, tuple[float, float]], initial_share: dict[str, float], tmp_path: Path) -> Results:
    """Systems by name: (Hit@10 of the initial rows, of the others), and the share of initial documents they return."""
    documents = [Document(f"{s}-{i}", "", "text") for s in range(SESSIONS) for i in range(ROWS)]
    rows = [
        [SessionRow(Query(f"q{s}-{i}", "?", (f"{s}-{i}",)), s, frozenset()) for i in range(ROWS)]
        for s in range(SESSIONS)
    ]
    data = RetrievalData("toy", "here", "", documents, {})
    plan = SessionPlan({d.id: int(d.id[0]) for d in documents}, [], [], [row for session in rows for row in session])
    protocol = EvaluationProtocol(Sessions(data, plan, data), rows, 10, 1, tmp_path)
    config = build(Config, {"method": "dynamic_retrieval", "evaluation": {"resamples": 300}})
    systems = {SessionSystem.parse(name): _evaluated(*q, initial_share.get(name, 0.4)) for name, q in quality.items()}
    return Results(config, protocol, systems)


def _evaluated(first: float, later: float, share: float) -> SessionResults:
    cells = []
    for session in range(SESSIONS):
        value = first if session == 0 else later
        hits = np.tile((np.arange(ROWS) < value * ROWS).astype(float), (1, SESSIONS, 1))
        hits[:, :session] = np.nan
        cells.append(hits)
    initial = [np.full((1, ROWS), share) + np.linspace(-0.1, 0.1, ROWS) for _ in range(SESSIONS)]
    oracle = [np.ones((1, ROWS)) for _ in range(SESSIONS)]
    facts = {INITIAL_SHARE: initial, ORACLE: oracle}
    return SessionResults({"Hit@10": cells}, facts, 0.0, [(10, 5.0)], np.array([2.0, 2.1, 2.2]), 100)


def _verdicts(results: Results) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims(results)}


QUALITY = {
    "bm25": (0.9, 0.9),
    "dense": (0.9, 0.9),
    "dual": (0.9, 0.75),
    "adc/rq": (0.8, 0.6),
    "autoregressive/rq": (0.8, 0.2),
    "autoregressive/multi_chunk": (0.8, 0.5),
    "ngram": (0.85, 0.8),
}


def test_claims_follow_from_what_was_measured(tmp_path: Path) -> None:
    results = _results(QUALITY, {"autoregressive/rq": 0.8}, tmp_path)
    made = _verdicts(results)
    assert made["F1 ngram autoregressive/rq"].verdict == "holds"
    assert made["F1 ngram autoregressive/rq"].effect == pytest.approx(0.6)
    assert made["F3-bm25 ngram bm25"].verdict == "does_not_hold"
    assert made["F3-dense ngram dual"].verdict == "holds"
    assert made["G-initial-share autoregressive/rq"].verdict == "holds"
    # Decoding among the session's documents alone finds everything: 0.8 more for rq, 0.1 more for dense.
    assert made["G-oracle autoregressive/rq"].effect == pytest.approx(0.7)
    assert made["H-better"].verdict == "holds"
    assert made["H-gap"].effect == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    assert made["K-bm25 autoregressive/rq"].effect == pytest.approx(0.6)


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if not family.is_control])
def test_every_family_with_content_takes_part_in_the_claims(family: Family, tmp_path: Path) -> None:
    system = f"autoregressive/{family.name}"
    made = _verdicts(_results({**QUALITY, system: (0.85, 0.3)}, {}, tmp_path))
    assert f"F1 {system} autoregressive/rq" in made if family.is_text else f"F1 ngram {system}" in made


def test_every_claim_of_the_design_is_made_when_its_systems_ran(tmp_path: Path) -> None:
    """Section 10b, claims F to K, of every pair: a system that claims misspell would silently drop them."""
    texts = ["ngram", "multiview", "autoregressive/text.title", "autoregressive/text.keywords"]
    numeric = ["autoregressive/rq", "autoregressive/pq", "autoregressive/hkmeans", "diffusion/rq"]
    several, one = "autoregressive/multi_chunk", "autoregressive/multi_chunk per_document=1"
    others = ["bm25", "dense", "dual", "adc/rq", "autoregressive/random", several, one]
    others += ["ngram embed=random", "autoregressive/rq embed=random"]
    others += ["ngram most_frequent=500", "ngram most_frequent=2000"]
    results = _results(dict.fromkeys([*others, *texts, *numeric], (0.8, 0.5)), {}, tmp_path)
    wanted = {f"F1 {text} {each}" for text in texts for each in numeric}
    wanted |= {"F2 ngram autoregressive/text.keywords", "F2 autoregressive/text.keywords autoregressive/text.title"}
    wanted |= {f"F2-chunks {several} {one}", "H-better", "H-gap", "H-latency", "H-initial", "H-average"}
    wanted |= {
        f"F3-{name} {text} {system}" for text in texts[:2] for name, system in (("bm25",) * 2, ("dense", "dual"))
    }
    wanted |= {f"{name} {each}" for name in ("G-initial-share", "G-oracle", "K-bm25", "K-dense") for each in numeric}
    wanted |= {"I-ngram", "I-autoregressive/rq", "I-more ngram autoregressive/rq"}
    wanted |= {"J ngram ngram most_frequent=2000", "J ngram most_frequent=2000 ngram most_frequent=500"}
    assert set(_verdicts(results)) == wanted


def test_a_system_is_read_as_it_is_written() -> None:
    text = "diffusion/multi_chunk per_document=1,expand=free,tie=residual"
    system = SessionSystem.parse(text)
    assert (system.label, system.paradigm, system.family) == (text, "diffusion", "multi_chunk")
    assert system.trained.label == "diffusion/multi_chunk per_document=1"
    assert SessionSystem.parse("ngram embed=random").trained.label == "ngram embed=random"


def test_a_text_system_that_has_not_learnt_decides_nothing(tmp_path: Path) -> None:
    results = _results({**QUALITY, "ngram": (0.5, 0.8)}, {}, tmp_path)
    made = _verdicts(results)["F1 ngram autoregressive/rq"]
    assert made.verdict == "undecided"
    assert "has not learnt" in made.statement
    share = _verdicts(results)["H-gap"]
    assert share.verdict == "undecided" and "ngram has not learnt" in share.statement
    assert _verdicts(_results(QUALITY, {}, tmp_path))["H-gap"].verdict == "holds"


def test_controls_decide_what_vectors_and_vocabulary_are_worth(tmp_path: Path) -> None:
    controls = {"ngram embed=random": (0.8, 0.3), "autoregressive/rq embed=random": (0.8, 0.1)}
    made = _verdicts(_results({**QUALITY, **controls, "ngram most_frequent=500": (0.9, 0.9)}, {}, tmp_path))
    assert made["I-ngram"].effect == pytest.approx(0.5)
    assert made["I-more ngram autoregressive/rq"].effect == pytest.approx(0.5 - 0.1)
    assert made["J ngram ngram most_frequent=500"].verdict == "does_not_hold"
    # A control is compared with its own system alone.
    assert not any("F1" in name and "=" in name for name in made)


def test_a_share_of_no_gap_is_not_defined(tmp_path: Path) -> None:
    results = _results({**QUALITY, "ngram": (0.85, 0.2)}, {}, tmp_path)
    made = _verdicts(results)["H-gap"]
    assert made.verdict == "undecided"
    assert "not defined" in made.statement


def test_the_report_holds_every_table_and_plot(tmp_path: Path) -> None:
    report = Report("dynamic_retrieval", "toy", 0, "")
    build_report(report, _results(QUALITY, {}, tmp_path), [["ngram", 0.01, None, True]])
    assert report.measures["ngram/GA/Hit@10"].value == pytest.approx(0.8)
    assert report.measures["ngram/P[2,1]/Hit@10"].n == ROWS
    drop = {row[0]: row for row in report.tables["Where the drop comes from"][1:]}["autoregressive/rq"]
    assert [cell.split(" ")[0] for cell in drop[1:]] == ["60.0", "20.0", "40.0"]  # whole, quantiser, model
    bias = {row[0]: row for row in report.tables["Bias towards the initial documents"][1:]}
    assert bias["bm25"][2] == pytest.approx(40 - 100 * (1 / 2 + 1 / 3) / 2, abs=0.1)
    assert {"new_documents", "initial_documents", "pareto"} == set(report.plots)
    assert not any("unequal candidate width" in note for note in report.notes)


def test_a_beam_beside_one_pass_over_all_documents_is_named(tmp_path: Path) -> None:
    report = Report("dynamic_retrieval", "toy", 0, "")
    results = _results({**QUALITY, "diffusion/rq": (0.5, 0.5)}, {}, tmp_path)
    build_report(report, results, [])
    width, size = results.config.evaluation.beam, results.protocol.sizes()[-1]
    assert f"unequal candidate width: diffusion/rq ranked {size}, autoregressive/rq {width}" in report.notes
    assert report.tables["Sessions"][3] == [2, ROWS, 3 * ROWS, ROWS, round(10 / (3 * ROWS), 5)]
