"""Claims on values made by hand, so that every verdict is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobula.config import build
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.sessions import SessionPlan, SessionRow
from mobula.experiment import Claim, Report
from mobula.retrieval.docids.families import FAMILIES, Family
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.dynamic.follow import ORACLE, TENDENCY, Followed, Protocol
from mobula.retrieval.dynamic.measures import Cells
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.report import Findings, claims, fill

ROWS, SESSIONS = 200, 3
SYSTEMS = ("bm25", "dense", "adc/rq", "autoregressive/rq", "autoregressive/multi_chunk", "ngram", "dual")


def _findings(quality: dict[str, tuple[float, float]], leaning: dict[str, float], tmp_path: Path) -> Findings:
    """Systems by name: (Hit@10 of the initial rows, of the others), and the share of initial documents they return."""
    documents = [Document(f"{s}-{i}", "", "text") for s in range(SESSIONS) for i in range(ROWS)]
    rows = [
        [SessionRow(Query(f"q{s}-{i}", "?", (f"{s}-{i}",)), s, frozenset()) for i in range(ROWS)]
        for s in range(SESSIONS)
    ]
    data = RetrievalData("toy", "here", "", documents, {})
    plan = SessionPlan({d.id: int(d.id[0]) for d in documents}, [], [], [row for found in rows for row in found])
    protocol = Protocol(Sessions(data, plan, data), rows, 10, 1, tmp_path)
    config = build(Config, {"method": "dynamic_retrieval", "evaluation": {"resamples": 300}})
    return Findings(config, protocol, {n: _followed(*q, leaning.get(n, 0.4)) for n, q in quality.items()})


def _followed(first: float, later: float, share: float) -> Followed:
    cells = []
    for session in range(SESSIONS):
        value = first if session == 0 else later
        found = np.tile((np.arange(ROWS) < value * ROWS).astype(float), (1, SESSIONS, 1))
        found[:, :session] = np.nan
        cells.append(found)
    leaning = [np.full((1, ROWS), share) + np.linspace(-0.1, 0.1, ROWS) for _ in range(SESSIONS)]
    oracle = [np.ones((1, ROWS)) for _ in range(SESSIONS)]
    made: Any = Followed(Cells({"Hit@10": cells}, {TENDENCY: leaning, ORACLE: oracle}), None)  # type: ignore[arg-type]
    made.ms, made.admitted, made.bytes = np.array([2.0, 2.1, 2.2]), [(10, 5.0)], 100
    return made


def _verdicts(found: Findings) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims(found)}


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
    found = _findings(QUALITY, {"autoregressive/rq": 0.8}, tmp_path)
    made = _verdicts(found)
    assert made["F1 ngram autoregressive/rq"].verdict == "holds"
    assert made["F1 ngram autoregressive/rq"].effect == pytest.approx(0.6)
    assert made["F3-bm25 ngram bm25"].verdict == "does_not_hold"
    assert made["F3-dense ngram dual"].verdict == "holds"
    assert made["G-tendency autoregressive/rq"].verdict == "holds"
    # Decoding among the session's documents alone finds everything: 0.8 more for rq, 0.1 more for dense.
    assert made["G-oracle autoregressive/rq"].effect == pytest.approx(0.7)
    assert made["H-better"].verdict == "holds"
    assert made["H-gap"].effect == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    assert made["K-bm25 autoregressive/rq"].effect == pytest.approx(0.6)


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if not family.is_control])
def test_every_family_with_content_takes_part_in_the_claims(family: Family, tmp_path: Path) -> None:
    system = f"autoregressive/{family.name}"
    made = _verdicts(_findings({**QUALITY, system: (0.85, 0.3)}, {}, tmp_path))
    assert f"F1 {system} autoregressive/rq" in made if family.is_text else f"F1 ngram {system}" in made


def test_a_text_system_that_has_not_learnt_decides_nothing(tmp_path: Path) -> None:
    found = _findings({**QUALITY, "ngram": (0.5, 0.8)}, {}, tmp_path)
    made = _verdicts(found)["F1 ngram autoregressive/rq"]
    assert made.verdict == "undecided"
    assert "has not learnt" in made.statement


def test_a_share_of_no_gap_is_not_defined(tmp_path: Path) -> None:
    found = _findings({**QUALITY, "ngram": (0.85, 0.2)}, {}, tmp_path)
    made = _verdicts(found)["H-gap"]
    assert made.verdict == "undecided"
    assert "not defined" in made.statement


def test_the_report_holds_every_table_and_plot(tmp_path: Path) -> None:
    report = Report("dynamic_retrieval", "toy", 0, "")
    fill(report, _findings(QUALITY, {}, tmp_path), [["ngram", 0.01, None, True]])
    assert report.measures["ngram/GA/Hit@10"].value == pytest.approx(0.8)
    assert report.measures["ngram/P[2,1]/Hit@10"].n == ROWS
    drop = {row[0]: row for row in report.tables["Where the drop comes from"][1:]}["autoregressive/rq"]
    assert [cell.split(" ")[0] for cell in drop[1:]] == ["60.0", "20.0", "40.0"]  # whole, quantiser, model
    leaning = {row[0]: row for row in report.tables["Leaning to the initial documents"][1:]}
    assert leaning["bm25"][2] == pytest.approx(40 - 100 * (1 / 2 + 1 / 3) / 2, abs=0.1)
    assert {"new_documents", "initial_documents", "pareto"} == set(report.plots)
    assert report.tables["Sessions"][3] == [2, ROWS, 3 * ROWS, ROWS, round(10 / (3 * ROWS), 5)]
