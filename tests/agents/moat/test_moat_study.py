"""A whole run of MOAT on a tiny world: what is left on disk, that it repeats, resumes and rolls back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mobula import artifacts, methods
from mobula.agents.moat.config import Config
from mobula.agents.moat.stage import Checkpoint
from mobula.alternation import Row
from mobula.artifacts import sha256
from mobula.config import build
from mobula.errors import ConfigError
from tests.agents.moat.small import run_in

CONFIG: dict[str, Any] = {
    "method": "moat",
    "name": "tiny",
    "arms": ["moat", "moat_no_gate", "no_critic"],
    "tasks": {"train": 30, "align": 12, "probe": 9, "dev": 12, "test_in": 9, "test_out": 9},
    "model": {"width": 32, "layers": 1},
    "moat": {"samples": 4, "margin": 0.0, "fewest_pairs": 1, "max_plan": 24, "max_program": 24, "max_leak": 1.0},
    "gate": {"retries": 1},
    "alternation": {"iterations": 2, "actors": 0},
    "sft": {"workers": 0, "steps": 60, "lr": 5e-3},
    "dpo": {"workers": 0, "steps": 4, "batch": 4},
    "grounder_sft": {"workers": 0, "steps": 4, "batch": 8},
    "evaluation": {"decisive": False, "resamples": 200},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("moat") / "run", CONFIG)


def rows(directory: Path, arm: str = "moat") -> list[Row]:
    lines = (directory / "seed-0" / arm / "iterations.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def weights(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256(p) for p in directory.rglob("model/model.safetensors")}


def test_a_row_an_iteration_with_what_its_stages_did(directory: Path) -> None:
    start, *later = rows(directory)
    measured = {"J", "dev_success", "dev_arith", "dev_kb", "dev_shop", "leak_rate", "parse_rate", "gap_nll"}
    assert set(start) == {"iteration", *measured}
    for row in later:
        assert row["J"] <= 0
        assert row["n_pairs"] > 0
        assert set(row["gate"]) == {"dpo", "grounder_sft"} == set(row["J_stages"])
        assert row["critic_accept"] + row["critic_correct"] + row["critic_drop"] == pytest.approx(1)


def test_arms_start_alike_and_then_go_their_own_ways(directory: Path) -> None:
    assert rows(directory)[0] == rows(directory, "no_critic")[0]
    assert rows(directory, "no_critic")[1]["critic_accept"] == 1
    first = [directory / "seed-0" / arm / "iteration-001" for arm in ("moat", "no_critic")]
    proposed = [(path / "00-sample" / "shard-00000.jsonl").read_bytes() for path in first]
    assert proposed[0] == proposed[1]


def test_the_report_compares_all_agents_with_own_and_gold_plans(directory: Path) -> None:
    report = json.loads((directory / "report.json").read_text())
    agents = (
        "independent",
        "independent, plan gold",
        "moat",
        "moat, plan gold",
        "moat, iterations 1",
        "moat_no_gate",
        "no_critic",
    )
    assert set(report["measures"]) >= {f"{name}/{split}" for name in agents for split in ("test_in", "test_out")}
    assert {name.split("/")[0] for name in report["measures"]} == set(agents)
    assert {claim["verdict"] for claim in report["claims"]} == {"undecided"}
    assert {"C1 independent", "C2 independent", "C6 no_critic", "C8 gap_s"} <= {c["name"] for c in report["claims"]}
    assert (directory / "plots" / "surrogate_by_stage.png").is_file()


def test_another_run_comes_to_the_same_numbers_also_when_interrupted(directory: Path, tmp_path: Path) -> None:
    """Cut short in the midst of a phase of the second iteration, of one arm, and gone on with."""
    again = tmp_path / "run"
    shutil.copytree(directory, again)
    for path in (again / "report.json", again / "artifact", again / "results", again / "seed-0" / "no_critic"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    arm = again / "seed-0" / "moat"
    (arm / "iterations.jsonl").write_text("".join((arm / "iterations.jsonl").read_text().splitlines(True)[:2]))
    kept = ("00-sample", "01-score")
    for phase in (arm / "iteration-002").iterdir():
        if phase.name not in kept:
            shutil.rmtree(phase)
    (arm / "iteration-002" / "01-score" / "phase.json").unlink()
    run_in(again, CONFIG)
    assert rows(again) == rows(directory)
    assert rows(again, "no_critic") == rows(directory, "no_critic")
    assert weights(again) == weights(directory)


def test_a_rejected_stage_is_tried_again_slower_and_leaves_the_agents_as_they_were(tmp_path: Path) -> None:
    """And ungated arms are what they are: with the same gate, random pairs would be the grounder's half."""
    gate = {"retries": 1, "max_leak": 0.0, "min_parsed": 1.0, "j_slack_se": 0.0}
    training = {name: {**CONFIG[name], "lr": 0.3} for name in ("dpo", "grounder_sft")}
    arms = ["moat", "moat_no_gate", "random_pairs", "grounder_only"]
    config = {**CONFIG, **training, "arms": arms, "gate": gate, "alternation": {"iterations": 1, "actors": 0}}
    directory = run_in(tmp_path / "run", config)
    start, row = rows(directory)
    assert row["gate"] == {"dpo": False, "grounder_sft": False}
    assert row["stop"]  # nothing is left to do
    assert row["J"] == start["J"]
    assert rows(directory, "random_pairs")[1]["gate"] == {"dpo": True, "grounder_sft": True}
    assert rows(directory, "random_pairs")[1]["J"] != rows(directory, "grounder_only")[1]["J"]
    arm = directory / "seed-0" / "moat"
    rates = [
        [json.loads(line)["lr"] for line in path.read_text().splitlines() if "lr" in json.loads(line)][-1]
        for path in sorted(arm.rglob("*dpo-*/fit/metrics.jsonl"))
    ]
    assert rates[0] == pytest.approx(3 * rates[1])
    checkpoint = Checkpoint.read(next(arm.rglob("checkpoint.json")))
    assert checkpoint.planner == (directory / "seed-0" / "independent" / "planner" / "model").resolve()
    assert not list((arm / "iteration-001").rglob("checkpoint.json"))


def test_the_artifact_serves_without_the_run(directory: Path, tmp_path: Path) -> None:
    moved = tmp_path / "artifact"
    shutil.copytree(directory / "artifact", moved)
    artifact = artifacts.open_artifact(moved, kind="agents")
    predictor = methods.get("moat").load(artifact)
    solution = predictor.solve(
        "anna has 3 apples . then 2 more come . 1 are lost . how many apples are there now ?", "arith"
    )
    assert solution.plan
    assert solution.status in (
        "ok",
        "parse_error",
        "unknown_tool",
        "unbound_variable",
        "bad_argument",
        "tool_error",
        "limit",
    )
    assert solution.answer is None or solution.status == "ok"
    names = set(artifact.files)
    assert {
        "planner/model.safetensors",
        "grounder/tokenizer.json",
        "tools.json",
        "templates.json",
        "world.json",
    } <= names
    with pytest.raises(KeyError):
        predictor.solve("x", "chess")


def test_a_trial_reports_every_iteration_and_shares_its_start(directory: Path, tmp_path: Path) -> None:
    config = build(Config, CONFIG)
    reported: list[dict[str, Any]] = []
    for number in range(2):
        methods.get("moat").train_trial(config, tmp_path / str(number), reported.append)
    wanted = [{name: row[name] for name in ("iteration", "dev_success", "J")} for row in rows(directory)]
    assert reported == [*wanted, *wanted]
    assert len(list((tmp_path / "prepared").iterdir())) == 1
    methods.get("moat").train_trial(config, tmp_path / "1", reported.append)  # interrupted before it was kept
    assert reported[-1] == wanted[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["moats"]}, "did you mean moat"),
        ({"arms": []}, "arms is empty"),
        ({"model": {"width": 30}}, "does not divide"),
        ({"moat": {"critic": "kind"}}, "critic"),
        ({"stage0": {"steps": 3}}, "stage0.*was renamed.*sft"),
        ({"prefer": {"lr": 1e-3}}, "prefer.*was renamed.*dpo"),
        ({"improve": {"workers": 0}}, "improve.*was renamed.*grounder_sft"),
        ({"matched": {"lr": 1e-3}}, "matched.*was renamed.*budget_matched"),
        ({"parallel": 2, "alternation": {"actors": 0}}, "parallel=2 needs sft.workers=0"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config, {"method": "moat", **change})
