"""A study: stages in order, every arm with every seed, results once on disk, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mobula.config import build, key
from mobula.errors import MobulaError
from mobula.evaluation import tables
from mobula.experiment import Report, Run
from mobula.study import Results, Study, StudyConfig, System


@dataclass
class Config(StudyConfig):
    arms: list[str] = key(["ours", "plain"], "arms")


@dataclass
class Arms:
    calls: list[str] = field(default_factory=list)

    def train(self, arm: str, seed: int, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.calls.append(f"train {arm} {seed} {directory.name}")

    def evaluate(self, system: System, seed: int, directory: Path):
        self.calls.append(f"evaluate {system.label} {seed} {directory.name}")
        gain = {"ours": 1.0, "plain": 0.0}[system.arm] - 0.5 * bool(system.options)
        for query in range(20):
            yield {
                "query": str(query),
                "stratum": ["seen", "unseen"][query % 2],
                "score": gain + 0.01 * seed + 0.001 * query,
                "rare": 1.0 if query < 4 else None,
            }

    def curve(self, arm: str, seed: int) -> list[dict[str, float]]:
        return [{"iteration": i, "dev": i + seed} for i in range(2 + seed)]


OFF = System.of("ours", think="off")


def executed(directory: Path, arms: Arms) -> Results:
    config = build(Config, {"method": "toy", "evaluation": {"seeds": 2, "resamples": 200}})
    with Run.open(directory, config) as run:
        stages = [["start"], config.arms]
        systems = [System("ours"), System("plain"), OFF]
        return Study(run, stages, systems, arms.train, arms.evaluate, arms.curve, ["ours"]).execute()


def test_a_stage_waits_for_the_one_before_and_tests_come_last(tmp_path: Path) -> None:
    arms = Arms()
    executed(tmp_path, arms)
    order = [call.split()[1] for call in arms.calls]
    assert order[:2] == ["start", "start"] and set(order[2:6]) == {"ours", "plain"}
    assert [call.split()[0] for call in arms.calls] == ["train"] * 6 + ["evaluate"] * 6
    assert arms.calls[0] == "train start 0 start" and "evaluate ours, think off 1 seed-1" in arms.calls


def test_test_examples_are_looked_at_once(tmp_path: Path) -> None:
    executed(tmp_path, Arms())
    again = Arms()
    results = executed(tmp_path, again)
    assert not [call for call in again.calls if call.startswith("evaluate")]
    assert results.values("ours", "score").shape == (2, 20)


def test_values_by_seed_stratum_and_applicability(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    assert results.strata() == ["seen", "unseen"]
    assert results.values("ours", "score", "unseen").shape == (2, 10)
    assert results.values("ours", "rare").shape == (2, 4)
    np.testing.assert_allclose(results.values(OFF, "score")[1], 0.51 + 0.001 * np.arange(20))
    assert results.measure("ours", "score").value == pytest.approx(1.0145)
    assert results.difference("ours", OFF, "score").value == pytest.approx(0.5)
    assert results.claim("better", "ours is better", "ours", "plain", "score").verdict == "holds"


def test_a_system_that_was_not_evaluated_is_an_error_that_names_those_that_were(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    with pytest.raises(MobulaError, match=r"ours, think on was not evaluated \(there are: ours, plain, ours, think of"):
        results.claim("x", "x", System.of("ours", think="on"), "plain", "score")
    assert results.has(OFF) and not results.has("other")


def test_systems_are_equal_by_value_and_have_file_names() -> None:
    assert System.of(System.of("a", k=1), m=2) == System("a", (("k", 1), ("m", 2)))
    assert System.of("retriever/x", gold_plan="on").slug == "retriever-x-gold-plan-on"


def test_systems_of_the_same_options_are_one_whatever_their_order() -> None:
    assert System.of("a", x=1, y=2) == System.of("a", y=2, x=1)


def test_systems_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    config, arms = build(Config, {"method": "toy", "arms": ["a/b", "a-b"]}), Arms()
    with Run.open(tmp_path, config) as run, pytest.raises(MobulaError, match="share the name a-b"):
        Study(run, [], [System("a/b"), System("a-b")], arms.train, arms.evaluate).execute()


def test_other_test_examples_or_another_order_are_refused(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    runs = [list(reversed(run)) for run in results.runs("plain")]
    with pytest.raises(MobulaError, match="plain, seed 0: not evaluated on the test examples of the others"):
        Results(results.config, {**results.rows, System("plain"): runs}, {})


def test_an_unknown_metric_or_an_empty_stratum_is_an_error_that_says_so(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    with pytest.raises(MobulaError, match="ours was not measured by scroe"):
        results.values("ours", "scroe")
    with pytest.raises(MobulaError, match="claim x: no test example has score in nowhere"):
        results.claim("x", "x", "ours", "plain", "score", stratum="nowhere")
    assert results.values("ours", "score", "see").shape == (2, 10)


def test_claims_on_derived_values_know_the_clusters(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    rows = {
        s: [[{**row, "cluster": i // 10} for i, row in enumerate(run)] for run in results.runs(s)] for s in results.rows
    }
    clustered = Results(results.config, rows, results.curves)
    a, b = (clustered.values(name, "score") for name in ("ours", "plain"))
    told, own = (clustered.compare("x", "x", 2 * a, b, clusters=c) for c in ([i // 10 for i in range(20)], None))
    assert (told.low, told.high) == (own.low, own.high)
    with pytest.raises(MobulaError, match="which clusters its 4 columns belong to"):
        clustered.compare("x", "x", a[:, :4], b[:, :4])


def test_curves_end_where_a_seed_ends_and_tables_where_all_do(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    assert tables.curve(results.curves["ours"], "dev") == [(0.0, 0.5, 0, 1), (1.0, 1.5, 1, 2)]
    table = tables.iterations(results.curves, ["dev", "none"])
    assert table[0] == ["arm", "iteration", "dev", "none"]
    assert [row[1:] for row in table[1:]] == [[0, 0.5, ""], [1, 1.5, ""], [2, 3.0, ""]]
    assert tables.iterations(results.curves, ["none"])[1:] == []


def test_examples_of_one_cluster_are_resampled_together(tmp_path: Path) -> None:
    results = executed(tmp_path, Arms())
    pairs = {
        s: [[{**row, "cluster": i // 10} for i, row in enumerate(run)] for run in runs]
        for s, runs in results.rows.items()
    }
    clustered = Results(results.config, pairs, results.curves)
    one, other = results.measure("ours", "score"), clustered.measure("ours", "score")
    assert one.value == other.value and other.high - other.low > 1.2 * (one.high - one.low)


def test_the_report_has_every_system_metric_and_stratum(tmp_path: Path) -> None:
    results, report = executed(tmp_path, Arms()), Report("toy", "toy", 0, "0")
    results.report(report, {"score": "score, per cent", "rare": "rare"}, {"dev": "dev score"})
    assert report.measures["ours, think off/score/unseen"].n == 10
    assert report.measures["plain/rare"].n == 4
    assert [row[0] for row in report.tables["Test examples"]] == ["arm", "ours", "plain", "ours, think off"]
    assert report.tables["Beside ours, difference"][1][:2] == ["plain", "-100.0 [-100.0, -100.0]"]
    assert report.tables["score, per cent by stratum"][0] == ["arm", "seen", "unseen"]
    assert list(report.plots["dev"]["series"]) == ["ours"]


def test_problems_of_arms_and_of_trainings_at_the_same_time() -> None:
    config = build(Config, {"arms": ["ours", "ours", "plan", "old"], "parallel": 2})
    problems = list(config.study_problems(["ours", "plain"], {"fit.workers": None, "actors": 0}, {"old": "plain"}))
    assert problems == [
        "arms: unknown 'plan' (did you mean plain?); expected ours, plain",
        "arms: 'old' was renamed: use plain",
        "arms is empty or names one twice; the first one is served",
        "parallel=2 needs fit.workers=0: trainings have the actors",
    ]
