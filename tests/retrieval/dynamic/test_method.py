"""A whole run on real documents: trained on the first, searched while the others arrive, opened for serving."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import binom

from mobula import artifacts, methods, training
from mobula.cluster import spec as clusters
from mobula.config import build
from mobula.data import DataConfig, load_retrieval
from mobula.data.records import Document, Query
from mobula.data.sessions import SessionRow, plan_sessions
from mobula.errors import ConfigError, DataError, ModelError
from mobula.retrieval import train_arms
from mobula.retrieval.docids.text import tokens
from mobula.retrieval.dynamic import trial
from mobula.retrieval.dynamic.chunks import owner
from mobula.retrieval.dynamic.config import Config, EvaluationConfig, SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import (
    EvaluationProtocol,
    SessionResults,
    WeightsChanged,
    _counted,
    _values,
    evaluate_seed,
    restricted,
    sample_rows,
)
from mobula.retrieval.dynamic.prepare import FutureLeak, Sessions, check_fit
from mobula.retrieval.dynamic.study import SessionStudy
from mobula.retrieval.dynamic.systems import RetrieverSpec, systems
from mobula.retrieval.dynamic.train_systems import SystemTraining, Trained, fit_systems
from mobula.retrieval.search import Hit, SearchOptions
from mobula.running import run_experiment
from mobula.serving.calibration import Calibration
from mobula.training import FitResult, Training
from serve_apps.retriever.budget import plan
from serve_apps.retriever.schema import SearchRequest

CONFIG: dict[str, Any] = {
    "method": "dynamic_retrieval",
    "name": "tiny",
    "systems": [
        "bm25", "dense", "dual_hn", "adc", "autoregressive/rq", "diffusion/hkmeans", "autoregressive/random",
        "autoregressive/atomic", "autoregressive/text.title", "diffusion/multi_chunk", "ngram", "hybrid",
        "ngram most_frequent=60", "autoregressive/rq embed=random",
        "diffusion/multi_chunk expand=free", "diffusion/multi_chunk aggregate=sumexp,tie=residual",
    ],
    "data": {"name": "functions", "max_documents": 160, "keep": "relevant"},
    "sessions": {"split": "source", "sessions": 2},
    "docid": {"levels": 3, "codes": 8, "min_entropy": 0.0},
    "chunks": {"size": 24, "per_document": 2},
    "ngram": {"max_len": 3, "beam": 5, "spans": 3, "dev_queries": 10},
    "model": {"width": 32, "layers": 1, "query_len": 16},
    "pseudo_queries": {"per_document": 6},
    "learning_rates": {"numeric": [1e-2], "text": [1e-2], "dual": [1e-3]},
    "training": {"steps": 40, "batch": 64, "workers": 0},
    "evaluation": {"beam": 10, "max_rows": 25, "latency_queries": 2, "resamples": 200, "dev_queries": 20,
                   "decisive": False},
}  # fmt: skip
NUMERIC = "autoregressive/rq"
MULTI = "diffusion/multi_chunk"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("dynamic")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    try:
        run_experiment(path, [], folder / "run")
    except (DataError, ModelError) as error:
        pytest.skip(str(error))
    return folder / "run"


@pytest.fixture(scope="module")
def config() -> Config:
    return build(Config, CONFIG)


@pytest.fixture(scope="module")
def sessions(config: Config) -> Sessions:
    data = load_retrieval(config.data, quiet=True)
    return Sessions.of(data, plan_sessions(data, config.sessions))


@pytest.fixture(scope="module")
def trained(directory: Path, config: Config, sessions: Sessions) -> Trained:
    """The run's trainings, found again where it left them."""
    return fit_systems(config, sessions, directory, None)


@pytest.fixture(scope="module")
def report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


def _spec(config: Config, trained: Trained, name: str) -> RetrieverSpec:
    return systems(config, trained)[SessionSystem(name)]


def _protocol(sessions: Sessions, folder: Path | None = None) -> EvaluationProtocol:
    rows = [sample_rows(sessions.plan.rows(i), 10, 0) for i in range(sessions.count)]
    return EvaluationProtocol(sessions, rows, 20, 2, folder)


def test_titles_bring_their_tokens_with_them(config: Config, trained: Trained, sessions: Sessions) -> None:
    """A later title is its document's docid word by word, and the model that was trained before can generate it."""
    retriever = _spec(config, trained, "autoregressive/text.title").make(0)
    retriever.insert(sessions.documents(1))
    table = retriever.table
    assert len(table.tokens) > 0
    tokenizer = table.space.require_tokenizer()
    for document in sessions.documents(1)[:10]:
        wanted = tokenizer.encode([document.title.strip() or document.text])[0][: table.space.levels]
        assert tokens(table.vocabulary, table.codes[[table.rows[document.id]]]) == [wanted]
    (found,) = retriever.search(["anything"], [SearchOptions(k=len(table), decoder="exhaustive")])
    scores = {hit.doc_id: hit.score for hit in found.hits}
    assert all(np.isfinite(scores[document.id]) for document in sessions.documents(1))


def test_every_cell_of_every_system_is_measured(report: dict[str, Any]) -> None:
    names = {name.split("/P[")[0] for name in report["measures"] if "/P[1,0]" in name}
    assert {"bm25", "adc/rq", NUMERIC, MULTI, f"{MULTI} expand=free", "ngram", "hybrid"} <= names
    for system in names:
        cells = [f"{system}/P[{t},{i}]/Hit@10" for t in range(3) for i in range(t + 1)]
        assert all(0 <= report["measures"][cell]["value"] <= 1 for cell in cells)
        assert f"{system}/GA/Hit@1" in report["measures"]


def test_a_run_makes_the_claims_of_its_systems(report: dict[str, Any]) -> None:
    made = {claim["name"] for claim in report["claims"]}
    texts, numeric = ("ngram", "autoregressive/text.title"), (NUMERIC, "diffusion/hkmeans")
    assert {f"F1 {text} {each}" for text in texts for each in numeric} <= made
    kinds = ("G-initial-share", "G-oracle", "K-bm25", "K-dense")
    assert {f"{kind} {each}" for kind in kinds for each in numeric} <= made
    assert {"F3-bm25 ngram bm25", "H-latency", "J ngram ngram most_frequent=60", f"I-{NUMERIC}"} <= made


def test_a_control_trains_by_its_own_setting(config: Config, trained: Trained, directory: Path) -> None:
    control, plain = trained.tasks["ngram most_frequent=60"].build(), trained.tasks["ngram"].build()
    assert control.shape.sizes[0] < 70 < plain.shape.sizes[0]
    shapes = [trained.tasks[name].build().shape.token_embed for name in (f"{NUMERIC} embed=random", NUMERIC)]
    assert shapes == ["random", "wordllama"]
    # It is for the report: neither served nor what a fusion takes.
    assert artifacts.open_artifact(directory / "artifact").meta["ngrams"] == ["ngram"]


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        (["ngram most_frequent=60"], "name 'ngram' too"),
        (["ngram", "ngram most_frequent=many"], "most_frequent='many': expected"),
        (["ngram", "ngram frequent=60"], "ngram cannot set 'frequent', only embed or most_frequent"),
        (["ngram", "ngram embed"], "write the system, a space, and what it sets"),
        (["autoregressive/rq", "autoregressive/rq most_frequent=9"], "cannot set 'most_frequent', only embed"),
        (["bm25", "bm25 embed=random"], "bm25 cannot set 'embed', only nothing"),
        (["ngram", "ngram most_frequent=null"], "sets what the config has already"),
    ],
)
def test_a_control_that_cannot_be_is_refused(systems: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(Config, {"method": "dynamic_retrieval", "systems": systems})


def test_a_sweep_refuses_controls(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a sweep sets the key for all its systems"):
        trial.train_trial(config, tmp_path, lambda row: None)


def test_run_files_are_written_for_every_cell(directory: Path) -> None:
    assert {p.name for p in (directory / "runs" / "bm25-s0").iterdir()} == {
        f"run_{t}_{i}.txt" for t in range(3) for i in range(t + 1)
    }


def test_random_and_atomic_docids_find_no_new_document(report: dict[str, Any]) -> None:
    for system in ("autoregressive/random", "autoregressive/atomic"):
        for t in (1, 2):
            cell = report["measures"][f"{system}/P[{t},{t}]/Hit@10"]
            # Chance: ten of at least 80 documents.
            assert cell["value"] * cell["n"] <= binom.ppf(0.975, cell["n"], 10 / 80)


def test_existing_leaf_adds_no_code_and_free_does(report: dict[str, Any]) -> None:
    rows = {row[0]: row for row in report["tables"]["Docids at the last session"][1:]}
    assert rows[MULTI][5] == 0
    assert rows[f"{MULTI} expand=free"][5] > 0
    assert rows["autoregressive/atomic"][6] > 0  # documents that it could not insert


def test_a_second_run_is_identical_with_several_at_a_time(
    directory: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    run_experiment(path, ["parallel=2"], tmp_path / "again")
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["measures"] == report["measures"]


def test_the_cluster_reaches_every_training(
    directory: Path, config: Config, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is not told of it would run in this process whatever cluster.yaml says."""
    given: list[tuple[int, Any]] = []

    def fit_all(trainings: Sequence[Training], cluster: Any) -> list[FitResult]:
        given.append((len(trainings), cluster))
        return training.fit_all(trainings)  # finished, so that nothing is trained

    monkeypatch.setattr(train_arms, "fit_all", fit_all)
    cluster = clusters.load(Path(__file__).parents[3] / "cluster.yaml")
    every = SystemTraining(config, sessions, directory, cluster)
    trained = {system.trained.label for system in config.parsed} - {"bm25", "dense", "adc", "hybrid"}
    assert set(every.collect().results) == trained
    assert sum(count for count, _ in given) == len(trained)
    assert all(one is cluster for _, one in given)


@pytest.mark.parametrize("workers", [None, 2])
def test_trainings_at_the_same_time_cannot_have_workers(workers: int | None) -> None:
    given = {"method": "dynamic_retrieval", "parallel": 2, "training": {"workers": workers}}
    with pytest.raises(ConfigError, match="parallel=2 needs training"):
        build(Config, given)


def test_what_was_searched_is_kept_and_not_done_again(
    directory: Path, config: Config, sessions: Sessions, tmp_path: Path
) -> None:
    """An interrupted run goes on at the first system and seed that is missing."""
    study, bm25 = SessionStudy(config, sessions, directory, None), SessionSystem("bm25")
    kept = study.path(bm25, 0)
    fresh = evaluate_seed(study.specs[bm25], replace(study.protocol, directory=tmp_path), 0)
    found = SessionResults.load(kept)
    for name, rows in fresh.values.items():
        for one, other in zip(rows, found.values[name], strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.diagonal["oracle"][1], fresh.diagonal["oracle"][1])
    assert [count for count, _ in found.inserted] == [count for count, _ in fresh.inserted]
    before = kept.stat().st_mtime_ns
    study.evaluate(bm25, 0)
    assert kept.stat().st_mtime_ns == before


def test_insertion_changes_no_weight_codebook_or_old_code(config: Config, trained: Trained, sessions: Sessions) -> None:
    for name in (NUMERIC, "diffusion/hkmeans", MULTI):
        spec = _spec(config, trained, name)
        retriever: Any = spec.make(0)
        before = {id: code.tolist() for id, code in zip(retriever.table.doc_ids, retriever.table.codes, strict=True)}
        evaluate_seed(spec, _protocol(sessions), 0)  # would raise WeightsChanged
        retriever.insert(sessions.documents(1))
        after = {id: code.tolist() for id, code in zip(retriever.table.doc_ids, retriever.table.codes, strict=True)}
        assert before.items() <= after.items()
        assert len(after) > len(before)


def test_training_on_insertion_is_caught(config: Config, trained: Trained, sessions: Sessions) -> None:
    spec = _spec(config, trained, NUMERIC)

    def make(seed: int) -> Any:
        retriever: Any = spec.make(seed)
        insert = retriever.insert

        def cheat(documents: Sequence[Document]) -> int:
            with torch.no_grad():
                next(retriever.model.parameters()).add_(0.1)
            return insert(documents)

        retriever.insert = cheat
        return retriever

    with pytest.raises(WeightsChanged, match="changed weights"):
        evaluate_seed(replace(spec, make=make), _protocol(sessions), 0)


def test_what_was_fitted_on_other_documents_is_refused(directory: Path, sessions: Sessions, tmp_path: Path) -> None:
    for folder in ("documents", "chunks-2", "ngram"):
        check_fit(directory / "prepared" / folder, sessions.data, sessions)
    check_fit(tmp_path / "of_the_initial", sessions.initial, sessions)
    with pytest.raises(FutureLeak, match="fitted on other documents"):
        check_fit(tmp_path / "of_all", sessions.data, sessions)
    with pytest.raises(FutureLeak):  # whatever it is called with later
        check_fit(tmp_path / "of_all", sessions.initial, sessions)


def test_nothing_prepared_knows_a_later_document(trained: Trained, sessions: Sessions) -> None:
    later = {document.id for t in (1, 2) for document in sessions.documents(t)}
    for material in (trained.documents, *trained.chunks.values()):
        assert not later & {owner(d.id) or d.id for d in material.data.documents}
        assert not later & {gold for query in material.data.queries["train"] for gold in query.gold}
        assert not later & set().union(*material.prepared.dev_gold)


def test_test_queries_decide_nothing(config: Config, trained: Trained, sessions: Sessions, tmp_path: Path) -> None:
    blind = Sessions.of(sessions.data, replace(sessions.plan, test=[]))
    alone = replace(config, systems=[NUMERIC])
    again = fit_systems(alone, blind, tmp_path, None)
    ours, theirs = trained.results[NUMERIC][0], again.results[NUMERIC][0]
    assert ours.best == theirs.best
    assert ours.weights.read_bytes() == theirs.weights.read_bytes()


def test_a_new_process_inserts_the_same_way(
    directory: Path, config: Config, trained: Trained, sessions: Sessions
) -> None:
    opened: Any = methods.get("dynamic_retrieval").load(artifacts.open_artifact(directory / "artifact"))
    assert set(opened.documents) == {document.id for document in sessions.data.documents}
    queries = [row.query.text for row in sessions.plan.rows(2)][:8]
    for name in (NUMERIC, "diffusion/hkmeans", MULTI, "ngram", "bm25", "dense"):
        spec = _spec(config, trained, name)
        retriever = spec.make(0)
        for t in (1, 2):
            retriever.insert(sessions.documents(t))
        ours = retriever.search(queries, [spec.options] * len(queries))
        theirs = opened.retrievers[name].search(queries, [spec.options] * len(queries))
        assert [r.hits for r in ours] == [r.hits for r in theirs], name


def test_documents_leave_every_retriever(directory: Path, sessions: Sessions) -> None:
    opened: Any = methods.get("dynamic_retrieval").load(artifacts.open_artifact(directory / "artifact"))
    gone = [sessions.documents(0)[3].id, sessions.documents(2)[5].id]
    fewer = opened.remove(gone)
    query = sessions.plan.rows(1)[0].query.text
    for name, retriever in fewer.retrievers.items():
        decoder = (*retriever.decoders, "match_rerank")[0]
        options = SearchOptions(k=200, decoder=decoder)
        found = {hit.doc_id for hit in retriever.search([query], [options])[0].hits}
        assert not found & set(gone), name
        before = {hit.doc_id for hit in opened.retrievers[name].search([query], [options])[0].hits}
        assert before & set(gone), name


def test_a_default_without_one_pass_keeps_its_decoder_over_budget(directory: Path) -> None:
    opened: Any = methods.get("dynamic_retrieval").load(artifacts.open_artifact(directory / "artifact"))
    request = SearchRequest(query="find a hotel", max_ms=1)
    name, options, budget = plan(request, opened, Calibration({"beam": {None: 50.0}}))
    assert (name, options.decoder, budget["over_budget"]) == (NUMERIC, "beam", True)
    assert opened.retrievers[name].search([request.query], [options])[0].hits


def test_restricted_decoding_finds_nothing_else(config: Config, trained: Trained, sessions: Sessions) -> None:
    ids = [document.id for document in sessions.documents(1)]
    query = sessions.plan.rows(1)[0].query.text
    for name in (NUMERIC, MULTI, "ngram", "hybrid"):
        spec = _spec(config, trained, name)
        retriever = spec.make(0)
        retriever.insert(sessions.documents(1))
        view: Any = restricted(copy.copy(retriever), ids)
        hits = view.search([query], [replace(spec.options, k=10)])[0].hits
        assert len(hits) == 10
        assert {hit.doc_id for hit in hits} <= set(ids)


def test_lists_are_full(config: Config, trained: Trained, sessions: Sessions) -> None:
    query = sessions.plan.rows(0)[0].query.text
    total = len(sessions.initial.documents)
    for system, spec in systems(config, trained).items():
        for k in (7, total + 50):
            (found,) = spec.make(0).search([query], [replace(spec.options, k=k)])
            assert len({hit.doc_id for hit in found.hits}) == len(found.hits) == min(k, total), system.label
            assert all(a.score >= b.score for a, b in zip(found.hits, found.hits[1:], strict=False)), system.label


def test_neutral_documents_are_neither_hits_nor_distractors() -> None:
    row = SessionRow(Query("q", "?", ("gold",)), 1, frozenset({"other", "source"}))
    hits = [Hit(name, -float(i)) for i, name in enumerate(["other", "source", "gold", "x"])]
    counted = _counted(hits, row, 3)
    assert [hit.doc_id for hit in counted] == ["gold", "x"]
    assert _values([counted], [row], 2, None)["Hit@1"] == [1.0]


def test_hits_are_documents_not_codes() -> None:
    """Forty documents of one code tie; the gold one of them is not among the first ten."""
    row = SessionRow(Query("q", "?", ("7",)), 0, frozenset())
    hits = [Hit(str(i), -1.0) for i in range(40)]
    assert _values([hits], [row], 40, None)["Hit@10"] == [0.0]


def test_a_planted_distractor_counts_against_earlier_sessions(
    config: Config, trained: Trained, sessions: Sessions
) -> None:
    """P[t, 0] searches the initial documents among all that have arrived."""
    protocol = _protocol(sessions)
    planted = [
        Document(f"planted-{i}-{copy_}", row.query.text, row.query.text)
        for i, row in enumerate(protocol.rows[0])
        for copy_ in range(20)
    ]
    data = replace(sessions.data, documents=[*sessions.data.documents, *planted])
    plan = replace(sessions.plan, session_of={**sessions.plan.session_of, **dict.fromkeys([d.id for d in planted], 1)})
    spoiled = replace(protocol, sessions=Sessions(data, plan, sessions.initial))
    bm25 = _spec(config, trained, "bm25")
    clean = evaluate_seed(bm25, protocol, 0).values["Hit@10"][0][0]
    worse = evaluate_seed(bm25, spoiled, 0).values["Hit@10"][0][0]
    assert worse[0].mean() == clean[0].mean() > 0.5
    assert worse[1].mean() < clean[1].mean() / 2
    assert np.isnan(evaluate_seed(bm25, protocol, 0).values["Hit@10"][2][0][1]).all()  # session 2 has not arrived


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": ["bm25", "autoregresive/rq"]}, "autoregresive"),
        ({"systems": []}, "systems is empty"),
        ({"systems": [NUMERIC, "classifier/multi_chunk"]}, "autoregressive or by diffusion"),
        ({"systems": [NUMERIC, "hybrid"]}, "name both"),
        ({"systems": [MULTI, f"{MULTI} expand=best"]}, "expand='best'"),
        ({"systems": [MULTI, f"{MULTI} colour=red"]}, "cannot set 'colour', only per_document or expand"),
        ({"evaluation": {"variants": ["expand=free"]}}, "renamed: use systems"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config, {"method": "dynamic_retrieval", **change})


def test_what_cannot_be_served_is_refused_by_a_run_alone() -> None:
    config = build(Config, {"method": "dynamic_retrieval", "systems": ["bm25", "ngram"]})
    assert "the first is served by default" in config.serving_problems()[0]


def test_a_trial_measures_its_last_system_on_initial_documents_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    measured: list[str] = []
    measure = trial.measure_arrival

    def spy(spec: RetrieverSpec, sessions: Sessions, config: Config) -> dict[str, float]:
        measured.append(spec.system.label)
        return measure(spec, sessions, config)

    monkeypatch.setattr(trial, "measure_arrival", spy)
    for number, wanted in enumerate((["ngram"], [MULTI, "ngram", "hybrid"])):
        point = replace(config, systems=wanted, training=replace(config.training, steps=5))
        trial.train_trial(point, tmp_path / str(number), rows.append)
    assert [set(row) for row in rows] == [{"step", "hit@10", "mrr@10", "ms"}] * 2
    assert measured == ["ngram", "hybrid"]
    # The second trial found the first one's n-grams, and trained its own numeric system.
    assert len(list((tmp_path / "prepared").glob("*/models"))) == 2


def test_a_simulated_arrival_knows_no_later_session(config: Config, sessions: Sessions) -> None:
    within = trial.simulated(config)
    known = {document.id for document in within.data.documents}
    assert known == {document.id for document in sessions.documents(0)}
    asked = {query.id for query in [*sessions.initial.queries["train"], *sessions.initial.queries["dev"]]}
    assert {row.query.id for row in within.plan.rows(1)} <= asked


def test_data_of_a_session_without_queries_is_refused(sessions: Sessions, tmp_path: Path) -> None:
    plan = replace(sessions.plan, test=[row for row in sessions.plan.test if row.session != 1])
    with pytest.raises(Exception, match="session 1 has no test query"):
        EvaluationProtocol.of(Sessions(sessions.data, plan, sessions.initial), EvaluationConfig(), 0, tmp_path)


def test_default_data_needs_no_folder() -> None:
    assert build(Config, {"method": "dynamic_retrieval"}).data == DataConfig()
