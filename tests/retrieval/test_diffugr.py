"""A whole run on a small real corpus: what its report must say and must not say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mobula import artifacts, methods
from mobula import config as configs
from mobula.evaluation import report as reports
from mobula.experiment import Report, Run
from mobula.retrieval.report import SEEN, UNSEEN
from mobula.retrieval.search import SearchOptions

pytestmark = pytest.mark.end_to_end
CONFIG = {
    "method": "diffugr",
    "name": "tiny",
    "arms": ["diffusion/rq", "autoregressive/rq", "classifier/rq", "diffusion/random"],
    "data": {"name": "functions", "max_documents": 150, "split": "by_document"},
    "docid": {"levels": 4, "codes": 8, "min_entropy": 0.0},
    "model": {"width": 32, "layers": 1, "query_len": 16},
    "pseudo_queries": {"per_document": 6},
    "learning_rates": {"diffusion": [1e-3, 1e-2], "autoregressive": [2e-3, 2e-2], "share": 0.5},
    "training": {"steps": 20, "batch": 64, "workers": 0},
    "evaluation": {
        "steps": [1, 4], "thresholds": [0.5], "orders": ["confidence"], "beams": [10], "latency_queries": 2,
        "resamples": 200, "dev_queries": 30, "max_queries": 40, "decisive": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(functions, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    method = methods.get("diffugr")
    with Run.open(directory, configs.build(method.Config, CONFIG)) as run:
        report = method.run(run)
        reports.write(report, run.directory)
    return directory, report


def test_lr_swept_per_paradigm(finished: tuple[Path, Report]) -> None:
    """The report lists both grids, with the rate that dev chose in each (trap 17)."""
    header, *rows = finished[1].tables["Learning rates"]
    assert header == ["arm", "rate", "dev value of its trial", "chosen"]
    for arm, grid in (("diffusion/rq", [1e-3, 1e-2]), ("autoregressive/rq", [2e-3, 2e-2])):
        found = [row for row in rows if row[0] == arm]
        assert [row[1] for row in found] == grid
        (chosen,) = [row for row in found if row[3]]
        assert chosen[2] == max(row[2] for row in found)


def test_stratified_report(finished: tuple[Path, Report]) -> None:
    """Documents with and without training queries are separate rows, and no sentence speaks of generalisation
    (trap 22). The split is by document, so every test document is without."""
    header, *rows = finished[1].tables["By stratum"]
    assert header[:3] == ["system", "stratum", "queries"]
    strata = {row[1] for row in rows}
    assert strata == {UNSEEN}
    assert SEEN != UNSEEN
    said = " ".join([*finished[1].notes, *(claim.statement for claim in finished[1].claims)])
    assert "generalis" not in said.lower()


def test_random_control(finished: tuple[Path, Report]) -> None:
    """Random docids of documents without training queries are not above chance's upper bound (trap 19)."""
    measure = finished[1].measures["diffusion/random one_pass/Hit@1"]
    chance = 1 / 150
    draws = np.random.default_rng(0).binomial(measure.n, 2 * chance, 20_000) / measure.n  # up to 2 gold documents
    assert measure.value <= np.quantile(draws, 0.975)


def test_equal_width_guard(finished: tuple[Path, Report]) -> None:
    """No Hit@100 from a beam of 10, and comparisons of unequal width are labelled (trap 13)."""
    report = finished[1]
    assert "autoregressive/rq beam 10/Hit@10" in report.measures
    assert "autoregressive/rq beam 10/Hit@100" not in report.measures
    assert "autoregressive/rq exhaustive/Hit@100" in report.measures
    assert any("unequal candidate width" in note for note in report.notes)


def test_raw_rates_stand_beside_every_diffusion_row(finished: tuple[Path, Report]) -> None:
    title = next(title for title in finished[1].tables if title.startswith("test:"))
    header, *rows = finished[1].tables[title]
    valid, exact = header.index("raw valid %"), header.index("raw exact %")
    decoded = [row for row in rows if row[0].startswith("diffusion/rq match")]
    assert len(decoded) >= 4
    assert all(row[valid] is not None and row[exact] is not None for row in decoded)


def test_too_small_a_run_decides_nothing(finished: tuple[Path, Report]) -> None:
    claims = finished[1].claims
    assert {"A-rerank", "F-rerank", "G-adc", "G-random", "E-outperforms exhaustive"} <= {claim.name for claim in claims}
    assert {claim.verdict for claim in claims} == {"undecided"}


def test_the_run_leaves_what_it_promises(finished: tuple[Path, Report]) -> None:
    directory, report = finished
    written = json.loads((directory / "report.json").read_text())
    assert written["measures"].keys() == report.measures.keys()
    assert {path.name for path in (directory / "plots").glob("*.png")} == {"budget.png", "pareto.png"}
    assert len(list((directory / "runs" / "test").glob("*.trec"))) > 10
    assert json.loads((directory / "state.json").read_text())["finished"] is True


def test_the_artifact_answers_as_the_run_did(finished: tuple[Path, Report]) -> None:
    directory, report = finished
    opened = artifacts.open_artifact(directory / "artifact", kind="retriever")
    library = methods.get(opened.method).load(opened)
    assert library.default == "diffusion/rq"
    queries = library.queries["test"]
    options = SearchOptions(k=10, decoder="one_pass")
    results = library.retrievers["diffusion/rq"].search([q.text for q in queries], [options] * len(queries))
    hit = np.mean([bool({h.doc_id for h in r.hits} & set(q.gold)) for r, q in zip(results, queries, strict=True)])
    assert hit >= report.measures["diffusion/rq one_pass/Hit@10"].value - 1e-9  # ties count against the report
